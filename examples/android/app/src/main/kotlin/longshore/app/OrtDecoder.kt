/** The student's graphs on ONNX Runtime: the decoder over a cache that it owns, and the encoder. Knows no text. */
package longshore.app

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtSession
import java.io.Closeable
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.IntBuffer
import java.nio.LongBuffer
import longshore.core.BundleIncompatible
import longshore.core.Decoder
import longshore.core.DeviceFailed
import longshore.core.KvGeometry
import longshore.core.Picture
import longshore.core.PictureEncoder
import longshore.core.VisionBucket
import longshore.core.VisionGeometry

/** With a `vision` geometry the graph takes `image_features` too, a row for each image token of the call. */
class OrtDecoder(
    model: File,
    private val kv: KvGeometry,
    numThreads: Int,
    private val vision: VisionGeometry? = null
) : Decoder, Closeable {
    private val environment = OrtEnvironment.getEnvironment()
    private val session = openSession(model, numThreads)

    /** Past and present of each layer are one tensor in memory of our own, so that a step copies nothing. */
    private val cache: Map<String, OnnxTensor> = LinkedHashMap<String, OnnxTensor>().apply {
        for (layer in 0 until kv.numLayers) for (what in listOf("key", "value")) put("$what.$layer", emptyCache())
    }

    override fun forward(tokenIds: IntArray, numPast: Int, features: FloatArray): FloatArray {
        val total = numPast + tokenIds.size
        if (total > kv.maxTokens) throw DeviceFailed("$total tokens do not fit into ${kv.maxTokens}")
        val own = ArrayList<OnnxTensor>()
        try {
            val inputs = LinkedHashMap<String, OnnxTensor>()
            inputs["input_ids"] = whole(own, LongArray(tokenIds.size) { tokenIds[it].toLong() }, 1, tokenIds.size)
            inputs["rows"] = whole(own, longArrayOf(tokenIds.size - 1L), 1)
            inputs["seqlens_k"] = count(own, total - 1)
            inputs["total_sequence_length"] = count(own, total)
            if (vision != null) {
                inputs["image_features"] = rows(own, features, features.size / vision.hiddenSize, vision.hiddenSize)
            }
            for ((name, tensor) in cache) inputs["past_$name"] = tensor
            val outputs = cache.entries.associate { "present_${it.key}" to it.value }
            session.run(inputs, setOf("logits"), outputs).use { results ->
                val logits = (results.get("logits").get() as OnnxTensor).floatBuffer
                return FloatArray(logits.remaining()).also { logits.get(it) }
            }
        } catch (error: OrtException) {
            throw DeviceFailed("the model did not run: ${error.message}")
        } finally {
            own.forEach { it.close() }
        }
    }

    override fun close() {
        session.close()
        cache.values.forEach { it.close() }
    }

    private fun emptyCache(): OnnxTensor {
        if (kv.dtype != "float32") throw BundleIncompatible("the cache is ${kv.dtype}")
        val numFloats = kv.numKvHeads * kv.maxTokens * kv.headDim
        val memory = ByteBuffer.allocateDirect(4 * numFloats).order(ByteOrder.nativeOrder()).asFloatBuffer()
        val shape = longArrayOf(1, kv.numKvHeads.toLong(), kv.maxTokens.toLong(), kv.headDim.toLong())
        return OnnxTensor.createTensor(environment, memory as FloatBuffer, shape)
    }

    private fun whole(own: MutableList<OnnxTensor>, values: LongArray, vararg shape: Int): OnnxTensor {
        val dims = LongArray(shape.size) { shape[it].toLong() }
        return OnnxTensor.createTensor(environment, LongBuffer.wrap(values), dims).also { own.add(it) }
    }

    private fun rows(own: MutableList<OnnxTensor>, values: FloatArray, vararg shape: Int): OnnxTensor {
        val dims = LongArray(shape.size) { shape[it].toLong() }
        return OnnxTensor.createTensor(environment, FloatBuffer.wrap(values), dims).also { own.add(it) }
    }

    private fun count(own: MutableList<OnnxTensor>, value: Int): OnnxTensor =
        OnnxTensor.createTensor(environment, IntBuffer.wrap(intArrayOf(value)), longArrayOf(1)).also { own.add(it) }
}

/** The picture encoder of a bundle. */
class OrtEncoder(model: File, numThreads: Int) : PictureEncoder, Closeable {
    private val environment = OrtEnvironment.getEnvironment()
    private val session = openSession(model, numThreads)

    override fun encode(picture: Picture): FloatArray = encode(picture.bucket, picture.planes)

    /** The rows [num_tokens, hidden] of pixels [3, height, width] from -1 to 1. */
    fun encode(bucket: VisionBucket, planes: FloatBuffer): FloatArray {
        val shape = longArrayOf(1, 3, bucket.heightPx.toLong(), bucket.widthPx.toLong())
        try {
            planes.rewind()
            OnnxTensor.createTensor(environment, planes, shape).use { pixels ->
                session.run(mapOf("pixel_values" to pixels), setOf("image_features")).use { results ->
                    val rows = (results.get("image_features").get() as OnnxTensor).floatBuffer
                    return FloatArray(rows.remaining()).also { rows.get(it) }
                }
            }
        } catch (error: OrtException) {
            throw DeviceFailed("the encoder did not run: ${error.message}")
        }
    }

    override fun close() = session.close()
}

private fun openSession(model: File, numThreads: Int): OrtSession {
    try {
        val options = OrtSession.SessionOptions()
        options.setIntraOpNumThreads(numThreads)
        options.setInterOpNumThreads(1)
        options.setMemoryPatternOptimization(false) // prompts differ in length
        options.addConfigEntry("session.intra_op.allow_spinning", "0") // an idle app stays idle
        return OrtEnvironment.getEnvironment().createSession(model.path, options)
    } catch (error: OrtException) {
        throw BundleIncompatible("this ONNX Runtime does not take the model: ${error.message}")
    }
}
