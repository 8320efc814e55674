/** The greedy generation loop over any decoder, and text from its tokens. Knows no runtime. */
package longshore.core

import java.nio.ByteBuffer
import java.nio.CharBuffer
import java.nio.charset.CodingErrorAction
import java.nio.charset.StandardCharsets

/** One model and its cache of keys and values. */
interface Decoder {
    /**
     * Computes `tokenIds` after the first `numPast` tokens of the cache; the last one's logits [vocab].
     * `features` are the rows [image tokens, hidden] of the image tokens among them, in order.
     */
    fun forward(tokenIds: IntArray, numPast: Int, features: FloatArray): FloatArray
}

/** A bundle's picture encoder. */
interface PictureEncoder {
    /** The picture's rows [num_tokens, hidden], row by row. */
    fun encode(picture: Picture): FloatArray
}

private val NO_FEATURES = FloatArray(0)

data class Token(val id: Int, val text: String)

/** What ended an answer, and the ids of its tokens. */
data class Generated(val tokenIds: List<Int>, val finishReason: String)

class Generator(
    private val decoder: Decoder,
    private val tokenizer: Tokenizer,
    private val manifest: Manifest,
    private val encoder: PictureEncoder? = null
) {
    /** Names the weights, so that another tier knows whether it can go on from the token ids. */
    val modelDigest: String get() = manifest.modelDigest
    private val imageTokenId = if (encoder == null) null else manifest.vision?.imageTokenId
    private var cached = ArrayList<Any>() // what the cache holds keys and values of: token ids, pictures' keys

    /** Answers `messages` greedily; each token goes to `emit`, which returns false to end the answer. */
    fun answer(messages: List<Message>, maxTokens: Int, emit: (Token) -> Boolean): Generated {
        val prompt = encodeChat(tokenizer, manifest.template, messages, imageTokenId)
        val room = manifest.kv.maxTokens - prompt.size
        if (room <= 0) throw PromptTooLong("the prompt has ${prompt.size} tokens, the model takes ${manifest.kv.maxTokens}")
        val text = Utf8Stream()
        val ids = ArrayList<Int>()
        var logits = prefill(prompt, messages.flatMap { it.pictures })
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
            logits = decoder.forward(intArrayOf(id), cached.size, NO_FEATURES)
            cached.add(id)
        }
    }

    /** Computes the prompt from where it differs from what the cache holds; its last token is always computed. */
    private fun prefill(prompt: IntArray, pictures: List<Picture>): FloatArray {
        val keys = keysOf(prompt, pictures)
        var numShared = 0
        while (numShared < minOf(cached.size, prompt.size - 1) && cached[numShared] == keys[numShared]) numShared++
        cached = ArrayList() // whatever the decoder throws, the cache is not taken for more than it is
        val features = featuresFrom(prompt, numShared, pictures)
        val logits = decoder.forward(prompt.copyOfRange(numShared, prompt.size), numShared, features)
        cached = keys
        return logits
    }

    /** The tokens, with what is shown in place of each image token. */
    private fun keysOf(prompt: IntArray, pictures: List<Picture>): ArrayList<Any> {
        val shown = pictures.flatMap { picture -> List(picture.bucket.numTokens) { picture.key } }.iterator()
        return prompt.mapTo(ArrayList()) { if (it == imageTokenId) shown.next() else it }
    }

    /** The rows of the image tokens from `begin` on; a picture that the cache holds whole is not encoded. */
    private fun featuresFrom(prompt: IntArray, begin: Int, pictures: List<Picture>): FloatArray {
        val vision = manifest.vision ?: return NO_FEATURES
        var numCached = (0 until begin).count { prompt[it] == imageTokenId }
        var features = NO_FEATURES
        for (picture in pictures) {
            val numTokens = picture.bucket.numTokens
            if (numCached < numTokens) {
                val rows = encoder!!.encode(picture)
                if (rows.size != numTokens * vision.hiddenSize) throw DeviceFailed("the encoder gave ${rows.size} numbers")
                features += rows.copyOfRange(numCached * vision.hiddenSize, rows.size)
            }
            numCached = maxOf(0, numCached - numTokens)
        }
        return features
    }

    /** The first of the largest logits, the image token's aside; raises DeviceFailed where one is not a number. */
    private fun bestOf(logits: FloatArray): Int {
        var best = -1
        for (index in logits.indices) {
            if (logits[index].isNaN()) throw DeviceFailed("the model gave a logit that is not a number")
            if (index != imageTokenId && (best < 0 || logits[index] > logits[best])) best = index
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
