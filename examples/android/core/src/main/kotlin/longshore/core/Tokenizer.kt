/**
 * Byte-level BPE as tokenizer.json describes it, and text from tokens. Loads no model.
 *
 * Takes the form that Llama-3-, Qwen- and GPT-2-like tokenizers have; anything else is refused when it is
 * read, never tokenized differently.
 */
package longshore.core

import java.io.ByteArrayOutputStream
import java.text.Normalizer
import java.util.regex.Pattern

private const val GPT2_PATTERN =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

// White_Space of Unicode, which \s means to the tokenizer but not to every regular expression engine.
private const val WHITE_SPACE = "\\t-\\r\\x85\\p{Z}"
private const val MAX_TEXT_CHARS = 1_000_000

class Tokenizer private constructor(
    private val pattern: Pattern,
    private val added: Map<String, Int>,
    private val vocabulary: Map<String, Int>,
    private val ranks: Map<Pair<String, String>, Int>,
    private val isNormalized: Boolean,
    private val takesWholeTokens: Boolean
) {
    private val tokens: Map<Int, String> = vocabulary.entries.associate { it.value to it.key }
    private val addedIds: Set<Int> = added.values.toSet()
    private val addedPattern: Pattern? = if (added.isEmpty()) null else Pattern.compile(
        added.keys.sortedByDescending { it.length }.joinToString("|") { Pattern.quote(it) }
    )

    /** The token ids of `text`; special tokens written out in it are taken as such. */
    fun encode(text: String): IntArray {
        checkLength(text)
        val ids = ArrayList<Int>()
        var begin = 0
        for (range in spellings(text)) {
            encodePlain(text.substring(begin, range.first), ids)
            ids.add(added.getValue(text.substring(range.first, range.last + 1)))
            begin = range.last + 1
        }
        encodePlain(text.substring(begin), ids)
        return ids.toIntArray()
    }

    /** The token ids of a text in which nothing is a special token. */
    fun encodeForeign(text: String): IntArray {
        checkLength(text)
        return ArrayList<Int>().also { encodePlain(text, it) }.toIntArray()
    }

    /** Where a text spells special tokens, in order. */
    fun spellings(text: String): List<IntRange> {
        val matcher = addedPattern?.matcher(text) ?: return emptyList()
        val found = ArrayList<IntRange>()
        while (matcher.find()) found.add(matcher.start() until matcher.end())
        return found
    }

    private fun checkLength(text: String) {
        if (text.length > MAX_TEXT_CHARS) throw PromptTooLong("the text has ${text.length} characters")
    }

    /** The bytes of a token's text; none for a special token or an id that there is not. */
    fun bytesOf(id: Int): ByteArray {
        val token = if (id in addedIds) null else tokens[id]
        val out = ByteArrayOutputStream()
        for (char in token ?: "") out.write(BYTE_OF[char] ?: return char.toString().toByteArray())
        return out.toByteArray()
    }

    private fun encodePlain(text: String, ids: MutableList<Int>) {
        val form = if (isNormalized) Normalizer.normalize(text, Normalizer.Form.NFC) else text
        val matcher = pattern.matcher(form)
        var begin = 0
        while (matcher.find()) { // what lies between two matches is a piece of its own
            if (matcher.start() > begin) encodePiece(form.substring(begin, matcher.start()), ids)
            if (matcher.end() > matcher.start()) encodePiece(matcher.group(), ids)
            begin = matcher.end()
        }
        if (begin < form.length) encodePiece(form.substring(begin), ids)
    }

    private fun encodePiece(piece: String, ids: MutableList<Int>) {
        val letters = piece.toByteArray().map { CHAR_OF[it.toInt() and 0xff].toString() }
        val whole = if (takesWholeTokens) vocabulary[letters.joinToString("")] else null
        if (whole != null) ids.add(whole) else merged(letters).mapTo(ids) { vocabulary.getValue(it) }
    }

    /** Merges the pair of the lowest rank, wherever it stands, until no pair has a rank. */
    private fun merged(letters: List<String>): List<String> {
        var parts = letters
        while (parts.size > 1) {
            var best: Pair<String, String>? = null
            var bestRank = Int.MAX_VALUE
            for (index in 0 until parts.size - 1) {
                val pair = Pair(parts[index], parts[index + 1])
                val rank = ranks[pair] ?: continue
                if (rank < bestRank) {
                    best = pair
                    bestRank = rank
                }
            }
            parts = replaced(parts, best ?: return parts)
        }
        return parts
    }

    private fun replaced(parts: List<String>, pair: Pair<String, String>): List<String> {
        val out = ArrayList<String>(parts.size)
        var index = 0
        while (index < parts.size) {
            if (index + 1 < parts.size && parts[index] == pair.first && parts[index + 1] == pair.second) {
                out.add(pair.first + pair.second)
                index += 2
            } else {
                out.add(parts[index++])
            }
        }
        return out
    }

    companion object {
        /** GPT-2's printable stand-in of each byte: itself where printable, else from U+0100 on, in order. */
        private val CHAR_OF: CharArray = CharArray(256).also { chars ->
            var next = 0x100
            for (byte in 0..255) {
                val isPrintable = byte in 0x21..0x7e || byte in 0xa1..0xac || byte in 0xae..0xff
                chars[byte] = if (isPrintable) byte.toChar() else (next++).toChar()
            }
        }
        private val BYTE_OF: Map<Char, Int> = (0..255).associateBy { CHAR_OF[it] }

        /** Reads tokenizer.json; raises BundleIncompatible for a form that this tokenizer does not know. */
        fun read(data: ByteArray): Tokenizer {
            val whole = try {
                parseJson(data) as Map<*, *>
            } catch (error: Exception) {
                throw BundleDamaged("the tokenizer can't be read: ${error.message}")
            }
            try {
                return build(whole)
            } catch (error: RuntimeException) { // LongshoreException is none: a field is missing or is of another type
                throw BundleDamaged("the tokenizer can't be read: ${error.message}")
            }
        }

        private fun build(whole: Map<*, *>): Tokenizer {
            val model = whole["model"] as Map<*, *>
            need(model["type"] == "BPE", "the model is ${model["type"]}")
            for (field in listOf("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")) {
                need((model[field] ?: "") == "", "the model has $field")
            }
            need(model["byte_fallback"] != true, "the model falls back on bytes")
            val vocabulary = LinkedHashMap<String, Int>()
            for ((token, id) in model["vocab"] as Map<*, *>) vocabulary[token as String] = (id as Long).toInt()
            need(CHAR_OF.all { it.toString() in vocabulary }, "a byte has no token")
            val ranks = HashMap<Pair<String, String>, Int>()
            (model["merges"] as List<*>).forEachIndexed { rank, merge -> ranks.putIfAbsentOf(pairOf(merge), rank) }
            need(ranks.keys.all { it.first + it.second in vocabulary }, "a merge has no token")
            val normalizer = (whole["normalizer"] as Map<*, *>?)?.get("type")
            need(normalizer == null || normalizer == "NFC", "the normalizer is $normalizer")
            return Tokenizer(
                Pattern.compile(splitPattern(whole["pre_tokenizer"] as Map<*, *>)),
                addedTokens(whole["added_tokens"] as List<*>? ?: emptyList<Any>(), normalizer != null),
                vocabulary,
                ranks,
                normalizer != null,
                model["ignore_merges"] == true
            )
        }

        private fun MutableMap<Pair<String, String>, Int>.putIfAbsentOf(pair: Pair<String, String>, rank: Int) {
            if (pair !in this) this[pair] = rank
        }

        private fun pairOf(merge: Any?): Pair<String, String> {
            val parts = if (merge is String) merge.split(" ") else merge as List<*>
            need(parts.size == 2, "a merge is not of two parts")
            return Pair(parts[0] as String, parts[1] as String)
        }

        private fun addedTokens(tokens: List<*>, isNormalized: Boolean): Map<String, Int> {
            val found = LinkedHashMap<String, Int>()
            for (token in tokens) {
                val fields = token as Map<*, *>
                val content = fields["content"] as String
                for (flag in listOf("single_word", "lstrip", "rstrip")) need(fields[flag] != true, "$content: $flag")
                need(!(isNormalized && fields["normalized"] == true), "$content is normalized")
                found[content] = (fields["id"] as Long).toInt()
            }
            return found
        }

        private fun splitPattern(step: Map<*, *>): String {
            val steps = if (step["type"] == "Sequence") step["pretokenizers"] as List<*> else listOf(step)
            val bytes = steps.last() as Map<*, *>
            need(bytes["type"] == "ByteLevel" && bytes["add_prefix_space"] != true, "it does not end in bytes")
            if (steps.size == 1) {
                need(bytes["use_regex"] != false, "it does not split")
                return withWhiteSpace(GPT2_PATTERN)
            }
            val split = steps[0] as Map<*, *>
            val isKnown = split["type"] == "Split" && split["behavior"] == "Isolated" && split["invert"] != true
            need(steps.size == 2 && isKnown && bytes["use_regex"] == false, "it splits in an unknown way")
            return withWhiteSpace((split["pattern"] as Map<*, *>)["Regex"] as String)
        }

        /** `\s` and `\S` written out, inside and outside of brackets. */
        private fun withWhiteSpace(pattern: String): String {
            val out = StringBuilder()
            var isInBrackets = false
            var index = 0
            while (index < pattern.length) {
                val char = pattern[index++]
                if (char != '\\') {
                    if (char == '[') isInBrackets = true
                    if (char == ']') isInBrackets = false
                    out.append(char)
                    continue
                }
                val escaped = pattern[index++]
                need(!(escaped == 'S' && isInBrackets), "its pattern holds \\S in brackets")
                when (escaped) {
                    's' -> out.append(if (isInBrackets) WHITE_SPACE else "[$WHITE_SPACE]")
                    'S' -> out.append("[^$WHITE_SPACE]")
                    else -> out.append(char).append(escaped)
                }
            }
            return out.toString()
        }

        private fun need(condition: Boolean, problem: String) {
            if (!condition) throw BundleIncompatible("this tokenizer is of another kind: $problem")
        }
    }
}
