/** The greedy generation loop over any decoder, and text from its tokens. Knows no runtime. */
package longshore.core

import java.nio.ByteBuffer
import java.nio.CharBuffer
import java.nio.charset.CodingErrorAction
import java.nio.charset.StandardCharsets

/** One model and its cache of keys and values. */
interface Decoder {
    /** Computes `tokenIds` after the first `numPast` tokens of the cache; the last one's logits [vocab]. */
    fun forward(tokenIds: IntArray, numPast: Int): FloatArray
}

data class Token(val id: Int, val text: String)

/** What ended an answer, and the ids of its tokens. */
data class Generated(val tokenIds: List<Int>, val finishReason: String)

class Generator(private val decoder: Decoder, private val tokenizer: Tokenizer, private val manifest: Manifest) {
    /** Names the weights, so that another tier knows whether it can go on from the token ids. */
    val modelDigest: String get() = manifest.modelDigest
    private var cached = IntArray(0) // the tokens whose keys and values the cache holds

    /** Answers `messages` greedily; each token goes to `emit`, which returns false to end the answer. */
    fun answer(messages: List<Message>, maxTokens: Int, emit: (Token) -> Boolean): Generated {
        val prompt = encodeChat(tokenizer, manifest.template, messages)
        val room = manifest.kv.maxTokens - prompt.size
        if (room <= 0) throw PromptTooLong("the prompt has ${prompt.size} tokens, the model takes ${manifest.kv.maxTokens}")
        val text = Utf8Stream()
        val ids = ArrayList<Int>()
        var logits = prefill(prompt)
        while (true) {
            val id = bestOf(logits)
            ids.add(id)
            val isEnd = id in manifest.eosTokenIds
            val isFull = ids.size >= minOf(maxTokens, room)
            val ready = text.push(if (isEnd) ByteArray(0) else tokenizer.bytesOf(id), isLast = isEnd || isFull)
            val goesOn = emit(Token(id, ready))
            if (isEnd) return Generated(ids, "stop")
            if (isFull) return Generated(ids, "length")
            if (!goesOn) return Generated(ids, "cancelled")
            logits = decoder.forward(intArrayOf(id), cached.size)
            cached += id
        }
    }

    /** Computes the prompt from where it differs from what the cache holds; its last token is always computed. */
    private fun prefill(prompt: IntArray): FloatArray {
        var numShared = 0
        while (numShared < minOf(cached.size, prompt.size - 1) && cached[numShared] == prompt[numShared]) numShared++
        cached = IntArray(0) // whatever the decoder throws, the cache is not taken for more than it is
        val logits = decoder.forward(prompt.copyOfRange(numShared, prompt.size), numShared)
        cached = prompt
        return logits
    }

    /** The first of the largest logits; raises DeviceFailed where one is not a number. */
    private fun bestOf(logits: FloatArray): Int {
        var best = 0
        for (index in logits.indices) {
            if (logits[index].isNaN()) throw DeviceFailed("the model gave a logit that is not a number")
            if (logits[index] > logits[best]) best = index
        }
        return best
    }
}

/** Bytes in, whole characters out; invalid bytes read as U+FFFD. */
class Utf8Stream {
    private val decoder = StandardCharsets.UTF_8.newDecoder()
        .onMalformedInput(CodingErrorAction.REPLACE)
        .onUnmappableCharacter(CodingErrorAction.REPLACE)
    private var waiting = ByteArray(0)

    fun push(bytes: ByteArray, isLast: Boolean = false): String {
        val source = ByteBuffer.wrap(waiting + bytes)
        val out = CharBuffer.allocate(source.remaining() + 2)
        decoder.decode(source, out, isLast)
        if (isLast) {
            decoder.flush(out)
            decoder.reset()
        }
        waiting = ByteArray(source.remaining()).also { source.get(it) }
        out.flip()
        return out.toString()
    }
}
