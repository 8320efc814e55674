/** Strict JSON (RFC 8259) with bounds, to plain maps, lists, strings, numbers and truths; and back. */
package longshore.core

import java.nio.ByteBuffer
import java.nio.charset.CharacterCodingException
import java.nio.charset.StandardCharsets

class JsonException(message: String) : Exception(message)

private const val MAX_DEPTH = 32
private val NUMBER = Regex("-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][+-]?[0-9]+)?")

/** One JSON value: Map, List, String, Long, Double, Boolean or null; a repeated name is an error. */
fun parseJson(text: String): Any? = JsonReader(text).whole()

/** The same of UTF-8 bytes; raises JsonException for anything else. */
fun parseJson(data: ByteArray): Any? {
    val decoder = StandardCharsets.UTF_8.newDecoder()
    val text = try {
        decoder.decode(ByteBuffer.wrap(data)).toString()
    } catch (error: CharacterCodingException) {
        throw JsonException("not UTF-8")
    }
    return parseJson(text)
}

private class JsonReader(private val text: String) {
    private var at = 0

    fun whole(): Any? {
        val value = value(1)
        blanks()
        if (at != text.length) throw JsonException("something follows at $at")
        return value
    }

    private fun value(depth: Int): Any? {
        if (depth > MAX_DEPTH + 1) throw JsonException("nested too deeply")
        blanks()
        return when (peek()) {
            '{' -> members(depth)
            '[' -> items(depth)
            '"' -> string()
            't' -> word("true", true)
            'f' -> word("false", false)
            'n' -> word("null", null)
            else -> number()
        }
    }

    private fun members(depth: Int): Map<String, Any?> {
        val found = LinkedHashMap<String, Any?>()
        at++
        blanks()
        if (taken('}')) return found
        do {
            blanks()
            val name = string()
            blanks()
            if (!taken(':')) throw JsonException("a colon is missing at $at")
            if (name in found) throw JsonException("$name stands twice")
            found[name] = value(depth + 1)
            blanks()
        } while (taken(','))
        if (!taken('}')) throw JsonException("an object does not end at $at")
        return found
    }

    private fun items(depth: Int): List<Any?> {
        val found = ArrayList<Any?>()
        at++
        blanks()
        if (taken(']')) return found
        do {
            found.add(value(depth + 1))
            blanks()
        } while (taken(','))
        if (!taken(']')) throw JsonException("a list does not end at $at")
        return found
    }

    private fun string(): String {
        if (!taken('"')) throw JsonException("a string is missing at $at")
        val out = StringBuilder()
        while (true) {
            val char = next()
            when {
                char == '"' -> return out.toString()
                char == '\\' -> out.append(escaped())
                char < ' ' -> throw JsonException("a control character stands in a string")
                else -> out.append(char)
            }
        }
    }

    private fun escaped(): Char {
        val char = next()
        return when (char) {
            '"', '\\', '/' -> char
            'b' -> '\b'
            'f' -> '\u000c'
            'n' -> '\n'
            'r' -> '\r'
            't' -> '\t'
            'u' -> hexadecimal()
            else -> throw JsonException("an unknown escape stands at $at")
        }
    }

    private fun hexadecimal(): Char {
        var code = 0
        repeat(4) {
            val digit = Character.digit(next(), 16)
            if (digit < 0) throw JsonException("an escape is not hexadecimal at $at")
            code = code * 16 + digit
        }
        return code.toChar()
    }

    private fun number(): Any {
        val match = NUMBER.find(text, at)
        if (match == null || match.range.first != at) throw JsonException("no value stands at $at")
        at = match.range.last + 1
        val whole = match.value.toLongOrNull()
        if (whole != null) return whole
        val real = match.value.toDouble()
        if (real.isInfinite()) throw JsonException("a number is too large")
        return real
    }

    private fun word(word: String, value: Any?): Any? {
        if (!text.startsWith(word, at)) throw JsonException("no value stands at $at")
        at += word.length
        return value
    }

    private fun blanks() {
        while (at < text.length && text[at] in " \t\r\n") at++
    }

    private fun peek(): Char = if (at < text.length) text[at] else throw JsonException("it ends too early")

    private fun next(): Char = peek().also { at++ }

    private fun taken(char: Char): Boolean {
        val isThere = at < text.length && text[at] == char
        if (isThere) at++
        return isThere
    }
}

/** Compact JSON of what `parseJson` gives. */
fun toJson(value: Any?): String = when (value) {
    null -> "null"
    is String -> quoted(value)
    is Boolean, is Int, is Long -> value.toString()
    is Double -> if (value.isNaN() || value.isInfinite()) throw JsonException("no JSON number") else value.toString()
    is Map<*, *> -> value.entries.joinToString(",", "{", "}") { quoted(it.key as String) + ":" + toJson(it.value) }
    is Iterable<*> -> value.joinToString(",", "[", "]") { toJson(it) }
    else -> throw JsonException("no JSON value: ${value.javaClass.name}")
}

private fun quoted(text: String): String = buildString {
    append('"')
    for (char in text) {
        when {
            char == '"' || char == '\\' -> append('\\').append(char)
            char < ' ' || Character.isSurrogate(char) -> append(String.format("\\u%04x", char.hashCode()))
            else -> append(char)
        }
    }
    append('"')
}
