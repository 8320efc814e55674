/**
 * Which tier answers: this device, and when it can't, the edge, going on from the text so far so that
 * nothing is lost and nothing said twice. Owns the choice; starts no runtime.
 */
package longshore.core

/** An answer and who gave it: `device`, or the tier that the edge named; `fallbackReason` if the device failed. */
data class Answer(val text: String, val servedBy: String, val fallbackReason: String?)

class Assistant(private val edge: EdgeClient, private val model: String, private val openDevice: () -> Generator) {
    private var device: Generator? = null

    /** Opens the device ahead of a question that needs to know it; what fails is told by the question. */
    fun prepare() {
        try {
            device = device ?: openDevice()
        } catch (error: Exception) {
            // the edge answers, or the error is told then
        }
    }

    /** Answers `messages`; with `isPrivate` nothing leaves the device, and its error is the caller's. */
    fun ask(messages: List<Message>, maxTokens: Int, isPrivate: Boolean = false, emit: (String) -> Unit): Answer {
        val said = StringBuilder()
        val tokenIds = ArrayList<Int>()
        val reason = try {
            val generator = device ?: openDevice().also { device = it }
            generator.answer(messages, maxTokens) { token ->
                tokenIds.add(token.id)
                said.append(token.text)
                emit(token.text)
                true
            }
            return Answer(said.toString(), "device", null)
        } catch (error: InvalidRequest) {
            throw error // the edge would refuse it as well
        } catch (error: Exception) { // whatever it is, the edge can still answer
            val fault = error as? LongshoreException ?: DeviceFailed("$error")
            if (isPrivate) throw fault
            fault.code
        }
        if (tokenIds.size >= maxTokens) return Answer(said.toString(), "device", reason)
        val servedBy = edge.chat(edgeRequest(messages, maxTokens, tokenIds, said.toString())) {
            said.append(it)
            emit(it)
        }
        return Answer(said.toString(), servedBy, reason)
    }

    private fun contentOf(message: Message): Any {
        val only = message.parts.singleOrNull() as? TextPart
        if (only != null) return only.text
        return message.parts.map {
            when (it) {
                is TextPart -> mapOf("type" to "text", "text" to it.text)
                is PicturePart -> mapOf("type" to "image_url", "image_url" to mapOf("url" to it.picture.dataUrl))
            }
        }
    }

    /** The request for the edge; what was said already is where its model goes on. */
    private fun edgeRequest(
        messages: List<Message>,
        maxTokens: Int,
        tokenIds: List<Int>,
        said: String
    ): Map<String, Any?> {
        val body = linkedMapOf<String, Any?>(
            "model" to model,
            "messages" to messages.map { mapOf("role" to it.role, "content" to contentOf(it)) },
            "temperature" to 0,
            "max_tokens" to maxTokens
        )
        if (said.isNotEmpty()) {
            // The text alone may lack a half character, which the next model then writes whole.
            val continuation = mapOf(
                "token_ids" to tokenIds,
                "text" to said,
                "segment" to 1,
                "model_digest" to device?.modelDigest
            )
            body["longshore"] = mapOf("continue_from" to continuation)
        }
        return body
    }
}
