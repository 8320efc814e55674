/**
 * Chat messages to token ids by the manifest's prefix and suffix table. Runs no template code.
 *
 * What people wrote never becomes a control token: where a message spells one, it is read as its characters.
 */
package longshore.core

data class Message(val role: String, val content: String)

// A role that the table does not hold is written as another that means the same.
private val STAND_IN = mapOf("developer" to "system")

/** The prompt, up to where the answer begins; raises InvalidRequest naming a role the model doesn't know. */
fun encodeChat(tokenizer: Tokenizer, template: ChatTemplate, messages: List<Message>): IntArray {
    val prompt = Prompt(tokenizer)
    prompt.own(template.start)
    for (message in messages) {
        val affixes = template.roles[message.role]
            ?: template.roles[STAND_IN[message.role] ?: message.role]
            ?: throw InvalidRequest("this model knows no role ${message.role}")
        prompt.own(affixes.prefix)
        prompt.foreign(message.content)
        prompt.own(affixes.suffix)
    }
    prompt.own(template.generationPrompt)
    return prompt.end()
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

    fun end(): IntArray {
        flush()
        return ids.toIntArray()
    }

    private fun flush() {
        ids.addAll(tokenizer.encode(text.toString()).asList())
        text.setLength(0)
    }
}
