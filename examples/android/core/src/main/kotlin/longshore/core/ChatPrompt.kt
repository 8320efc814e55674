/**
 * Chat messages to token ids by the manifest's prefix and suffix table. Runs no template code.
 *
 * What people wrote never becomes a control token: where a message spells one, it is read as its characters.
 */
package longshore.core

import java.nio.FloatBuffer

/**
 * A picture made ready: `planes` [3, height, width] in the bucket's size for the encoder, and `dataUrl` for the
 * edge. `key` names what is shown and the size, so equal keys give equal rows.
 */
class Picture(val key: String, val bucket: VisionBucket, val planes: FloatBuffer, val dataUrl: String)

sealed class Part

data class TextPart(val text: String) : Part()

data class PicturePart(val picture: Picture) : Part()

data class Message(val role: String, val parts: List<Part>) {
    constructor(role: String, content: String) : this(role, listOf(TextPart(content)))

    val pictures: List<Picture> get() = parts.filterIsInstance<PicturePart>().map { it.picture }
}

// A role that the table does not hold is written as another that means the same.
private val STAND_IN = mapOf("developer" to "system")

/**
 * The prompt, up to where the answer begins; a picture is as many image tokens as its size makes.
 *
 * Raises InvalidRequest naming a role the model doesn't know, UnsupportedParameter for a picture where there is no
 * image token.
 */
fun encodeChat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: List<Message>,
    imageTokenId: Int? = null
): IntArray {
    val prompt = Prompt(tokenizer)
    prompt.own(template.start)
    for (message in messages) {
        val affixes = template.roles[message.role]
            ?: template.roles[STAND_IN[message.role] ?: message.role]
            ?: throw InvalidRequest("this model knows no role ${message.role}")
        prompt.own(affixes.prefix)
        encodeParts(prompt, message.parts, imageTokenId)
        prompt.own(affixes.suffix)
    }
    prompt.own(template.generationPrompt)
    return prompt.end()
}

/** Texts next to each other are read as one, since a control token may be spelt across them. */
private fun encodeParts(prompt: Prompt, parts: List<Part>, imageTokenId: Int?) {
    val text = StringBuilder()
    for (part in parts) {
        if (part is TextPart) text.append(part.text)
        if (part is PicturePart) {
            val id = imageTokenId ?: throw UnsupportedParameter("this model takes no images")
            prompt.foreign(text.toString())
            text.setLength(0)
            prompt.tokens(id, part.picture.bucket.numTokens)
        }
    }
    prompt.foreign(text.toString())
}

/** Gathers text as long as it is encoded in one go; a control token's spelling is a piece of its own. */
private class Prompt(private val tokenizer: Tokenizer) {
    private val ids = ArrayList<Int>()
    private val text = StringBuilder()

    fun own(part: String) {
        text.append(part)
    }

    fun foreign(part: String) {
        var begin = 0
        for (spelling in tokenizer.spellings(part)) {
            text.append(part, begin, spelling.first)
            flush()
            val end = spelling.last + 1
            ids.addAll(tokenizer.encodeForeign(part.substring(spelling.first, end)).asList())
            begin = end
        }
        text.append(part, begin, part.length)
    }

    fun tokens(id: Int, count: Int) {
        flush()
        for (number in 0 until count) ids.add(id)
    }

    fun end(): IntArray {
        flush()
        return ids.toIntArray()
    }

    private fun flush() {
        ids.addAll(tokenizer.encode(text.toString()).asList())
        text.setLength(0)
    }
}
