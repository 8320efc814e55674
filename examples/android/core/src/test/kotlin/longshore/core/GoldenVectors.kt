/**
 * Checks the core against the golden vectors, whose expected values come from the Python packages:
 * `GoldenVectors GOLDEN_FOLDER TOKENIZER_JSON`. Prints how many cases of each kind agreed; exits 1 if any did not.
 */
package longshore.core

import java.io.File
import java.nio.FloatBuffer
import java.nio.file.Files
import java.util.Base64
import kotlin.system.exitProcess

private val ALGORITHMS = listOf("platform" to Ed25519::verifiesOnPlatform, "arithmetic" to Ed25519::verifiesInArithmetic)

private class Golden(private val folder: File, private val tokenizerFile: File) {
    private val tokenizer = Tokenizer.read(tokenizerFile.readBytes())
    private var failures = 0

    fun run(): Int {
        check("tokenizer") { checkText(it) }
        check("template") { checkTemplate(it) }
        check("pictures") { checkPicture(it) }
        check("bundles") { checkBundle(it) }
        check("runtimes") { checkRuntimeCase(it) }
        check("rotations") { checkRotation(it) }
        check("signatures") { checkSignature(it) }
        check("buckets") { checkBucket(it) }
        check("downloads") { checkDownload(it) }
        check("answers") { checkAnswer(it) }
        return failures
    }

    private fun check(name: String, judge: (Map<*, *>) -> String?) {
        val cases = load(name)["cases"] as List<*>
        for (case in cases) {
            val problem = judge(case as Map<*, *>) ?: continue
            failures++
            println("$name: ${case["name"] ?: case["text"] ?: case["messages"]}: $problem")
        }
        println("$name: ${cases.size} cases")
    }

    private fun load(name: String) = parseJson(File(folder, "$name.json").readBytes()) as Map<*, *>

    private fun checkText(case: Map<*, *>): String? {
        val ids = tokenizer.encode(case["text"] as String)
        if (longs(ids) != case["ids"]) return "ids are ${ids.toList()}"
        val stream = Utf8Stream()
        val text = ids.joinToString("") { stream.push(tokenizer.bytesOf(it)) } + stream.push(ByteArray(0), isLast = true)
        return differing(text, case["decoded"])
    }

    private fun checkTemplate(case: Map<*, *>): String? {
        val template = readManifest(bytes(load("template")["manifest"])).template
        return differing(longs(encodeChat(tokenizer, template, messagesOf(case))), case["ids"])
    }

    /** The prompt with its image tokens; what the decoder is given for them; that nothing is computed twice. */
    private fun checkPicture(case: Map<*, *>): String? {
        val manifest = readManifest(bytes(load("pictures")["manifest"]))
        val vision = manifest.vision ?: return "the manifest has no encoder"
        val messages = picturesOf(case)
        val ids = encodeChat(tokenizer, manifest.template, messages, vision.imageTokenId)
        differing(longs(ids), case["ids"])?.let { return it }
        val seen = Seen()
        val generator = Generator(seen, tokenizer, manifest, Numbered(vision.hiddenSize))
        val expected = messages.flatMap { it.pictures }.flatMap { picture ->
            List(picture.bucket.numTokens * vision.hiddenSize) { picture.key.toFloat() + it }
        }
        generator.answer(messages, 1) { true }
        differing(seen.features, expected)?.let { return it }
        generator.answer(messages, 1) { true }
        return differing(listOf(seen.numPast, seen.features.size), listOf(ids.size - 1, 0))
    }

    /** The same as a device does with a bundle that it was given: manifest, signature, each file. */
    private fun checkBundle(case: Map<*, *>): String? {
        val all = load("bundles")
        val folder = Files.createTempDirectory("longshore").toFile()
        val found: Any = try {
            val body = bytes(case["manifest"])
            val manifest = readManifest(body)
            TrustedKeys(texts(all["trusted"])).check(manifest, body, case["signature"] as String, nowS())
            val files = (case["files"] ?: all["files"]) as Map<*, *>
            for ((path, data) in files) File(folder, path as String).apply { parentFile.mkdirs() }.writeBytes(bytes(data))
            for (file in manifest.files) checkFile(folder, file)
            manifest.version
        } catch (error: LongshoreException) {
            error.code
        } finally {
            folder.deleteRecursively()
        }
        return differing(found, case["version"] ?: case["error"])
    }

    private fun checkRuntimeCase(case: Map<*, *>): String? {
        val found = try {
            checkRuntime(readManifest(bytes(case["manifest"])), case["have"] as String)
            null
        } catch (error: LongshoreException) {
            error.code
        }
        return differing(found, case["error"])
    }

    private fun checkRotation(case: Map<*, *>): String? {
        val (now, chain) = Pair(case["now_s"] as Long, (case["chain"] as List<*>).map { it as String })
        val trust = trustOf(Fields("trust", case["trust"]))
        val wiser = trust.withChain(chain, now)
        val known = wiser.keys.map { listOf(it.keyId, it.introducedBy) }
        val found: Any = try {
            wiser.keyFor(case["key_id"] as String, now).publicKey
        } catch (error: LongshoreException) {
            error.code
        }
        val kept = readTrust(trustText(wiser.learnt).toByteArray()).keys // as a store keeps them
        return differing(known, case["known"])
            ?: differing(found, case["key"] ?: case["error"])
            ?: differing(kept.fold(trust) { keys, key -> keys.with(key) }.keys.toSet(), wiser.keys.toSet())
    }

    private fun checkSignature(case: Map<*, *>): String? {
        val (key, signature, payload) = listOf("key", "signature", "payload").map { bytes(case[it]) }
        return ALGORITHMS.mapNotNull { (name, verifies) ->
            differing(verifies(key, signature, payload), case["is_valid"])?.let { "$name: $it" }
        }.firstOrNull()
    }

    private fun checkBucket(case: Map<*, *>): String? {
        val buckets = (case["buckets"] as List<*>).map { VisionBucket(whole(it, 0), whole(it, 1), whole(it, 2)) }
        val measured = case["calibration"] as Map<*, *>
        val (small, large) = Pair(measured["small"], measured["large"])
        val calibration = VisionCalibration(
            whole(small, 0).toLong(),
            whole(small, 1).toDouble(),
            whole(large, 0).toLong(),
            whole(large, 1).toDouble(),
            (measured["prefill_tokens_per_s"] as Long).toDouble()
        )
        val image = case["image"]
        val textTokens = (case["text_tokens"] as Long).toInt()
        val budgetMs = (case["budget_ms"] as Long).toDouble()
        val found = chooseBucket(buckets, whole(image, 0), whole(image, 1), calibration, textTokens, budgetMs)
        return differing(found?.let { listOf(it.widthPx.toLong(), it.heightPx.toLong()) }, case["chosen"])
    }

    private fun checkDownload(case: Map<*, *>): String? {
        val file = fileOf(Fields("file", case["file"]))
        return differing(goodBytes(bytes(case["part"]).inputStream(), file), case["resume_at"])
    }

    /** The tokens of an answer, as text; the graph itself needs ONNX Runtime, which the app has. */
    private fun checkAnswer(case: Map<*, *>): String? {
        val replay = Replay((case["ids"] as List<*>).map { (it as Long).toInt() })
        val manifest = readManifest(bytes(load("template")["manifest"]))
        val text = StringBuilder()
        val generated = Generator(replay, tokenizer, manifest).answer(messagesOf(case), replay.ids.size) {
            text.append(it.text)
            true
        }
        val ids = differing(longs(generated.tokenIds.toIntArray()), case["ids"])
        return ids ?: differing(text.toString(), case["text"]) ?: differing(longs(replay.prompt), case["prompt_ids"])
    }

    private fun differing(found: Any?, expected: Any?): String? =
        if (found == expected) null else "got $found, expected $expected"
}

/** A decoder whose best tokens are known beforehand. */
private class Replay(val ids: List<Int>) : Decoder {
    var prompt = IntArray(0)
    private var next = 0

    override fun forward(tokenIds: IntArray, numPast: Int, features: FloatArray): FloatArray {
        if (numPast == 0) prompt = tokenIds
        return FloatArray(4096).also { it[ids[next++]] = 1f }
    }
}

/** A decoder that notes what it was given. */
private class Seen : Decoder {
    var features = emptyList<Float>()
    var numPast = -1

    override fun forward(tokenIds: IntArray, numPast: Int, features: FloatArray): FloatArray {
        this.features = features.toList()
        this.numPast = numPast
        return FloatArray(8)
    }
}

/** An encoder whose numbers say which picture they are of, and where in it they stand. */
private class Numbered(private val hiddenSize: Int) : PictureEncoder {
    override fun encode(picture: Picture): FloatArray =
        FloatArray(picture.bucket.numTokens * hiddenSize) { picture.key.toFloat() + it }
}

/** Messages whose content is a list: texts, and in place of each picture the number of its tokens. */
private fun picturesOf(case: Map<*, *>): List<Message> {
    var number = 0
    return (case["messages"] as List<*>).map {
        val message = it as Map<*, *>
        Message(message["role"] as String, (message["content"] as List<*>).map { part ->
            if (part is String) TextPart(part) else {
                val bucket = VisionBucket(64, 64, (part as Long).toInt())
                PicturePart(Picture("${1000 * ++number}", bucket, FloatBuffer.allocate(0), ""))
            }
        })
    }
}

private fun messagesOf(case: Map<*, *>) = (case["messages"] as List<*>).map {
    val message = it as Map<*, *>
    Message(message["role"] as String, message["content"] as String)
}

private fun longs(ids: IntArray) = ids.map { it.toLong() }

private fun bytes(text: Any?): ByteArray = Base64.getDecoder().decode(text as String)

private fun texts(map: Any?) = (map as Map<*, *>).entries.associate { it.key as String to it.value as String }

private fun whole(list: Any?, index: Int) = ((list as List<*>)[index] as Long).toInt()

private fun nowS() = System.currentTimeMillis() / 1000

fun main(args: Array<String>) {
    val failures = Golden(File(args[0]), File(args[1])).run()
    println("$failures failed")
    if (failures > 0) exitProcess(1)
}
