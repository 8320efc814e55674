/** The one screen: a sheet, a question, the answer, and who gave it. */
package longshore.app

import ai.onnxruntime.OrtEnvironment
import android.app.Activity
import android.content.Intent
import android.net.Uri
import android.os.Bundle
import android.os.SystemClock
import android.widget.Button
import android.widget.CheckBox
import android.widget.EditText
import android.widget.TextView
import java.io.File
import java.nio.FloatBuffer
import java.util.concurrent.Executors
import longshore.core.Assistant
import longshore.core.BundleStore
import longshore.core.EdgeClient
import longshore.core.Generator
import longshore.core.InstalledBundle
import longshore.core.LongshoreException
import longshore.core.Manifest
import longshore.core.Message
import longshore.core.Part
import longshore.core.PicturePart
import longshore.core.TextPart
import longshore.core.Tokenizer
import longshore.core.TrustedKeys
import longshore.core.VisionBucket
import longshore.core.VisionCalibration
import longshore.core.checkRuntime
import longshore.core.measureVision

private const val BUNDLE = "shop-student"
private const val MODEL = "shop"
private const val MAX_TOKENS = 96
private const val NUM_THREADS = 2
private const val PICTURE_BUDGET_MS = 1000.0
private const val PICK_PICTURE = 1
private const val CALIBRATION_TOKENS = 64
private const val INSTRUCTION = "You answer questions about this product sheet."
private val PREFERRED = listOf("int4", "int8", "fp32")

/** What the choice of a picture's size goes by; without a device that sees, the edge's model scales for itself. */
private class Sight(val buckets: List<VisionBucket>, val calibration: VisionCalibration)

private val NO_SIGHT = Sight(listOf(VisionBucket(1, 1, 1)), VisionCalibration(1, 0.0, 1, 0.0, 1.0))

class MainActivity : Activity() {
    private val worker = Executors.newSingleThreadExecutor()
    private val edge = EdgeClient(BuildConfig.EDGE_URL, BuildConfig.API_KEY)
    private val keys = TrustedKeys(mapOf(BuildConfig.KEY_ID to BuildConfig.PUBLIC_KEY))
    private val assistant by lazy { Assistant(edge, MODEL) { openDevice() } }
    private val pictures by lazy { Pictures(contentResolver) }
    private var sight = NO_SIGHT // of the worker
    private var picked: Uri? = null // of the screen

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        setContentView(R.layout.main)
        findViewById<Button>(R.id.ask).setOnClickListener { ask() }
        findViewById<Button>(R.id.picture).setOnClickListener {
            val request = Intent(Intent.ACTION_OPEN_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE).setType("image/*")
            startActivityForResult(request, PICK_PICTURE)
        }
    }

    override fun onActivityResult(request: Int, result: Int, data: Intent?) {
        super.onActivityResult(request, result, data)
        if (request != PICK_PICTURE) return
        picked = if (result == RESULT_OK) data?.data else null
        val words = if (picked == null) R.string.picture else R.string.other_picture
        findViewById<Button>(R.id.picture).text = getString(words)
    }

    override fun onDestroy() {
        worker.shutdown()
        super.onDestroy()
    }

    private fun ask() {
        val sheet = findViewById<EditText>(R.id.sheet).text
        val question = findViewById<EditText>(R.id.question).text.toString()
        val isPrivate = findViewById<CheckBox>(R.id.is_private).isChecked
        val picture = picked
        findViewById<Button>(R.id.ask).isEnabled = false
        show(R.id.answer, "")
        show(R.id.facts, "")
        worker.execute {
            val facts = try {
                answer(messagesOf(sheet.toString(), question, picture), isPrivate)
            } catch (error: LongshoreException) {
                getString(R.string.failed, error.code, error.message)
            }
            runOnUiThread {
                show(R.id.facts, facts)
                findViewById<Button>(R.id.ask).isEnabled = true
            }
        }
    }

    /** Of a question about a picture, the picture stands in place of the sheet. */
    private fun messagesOf(sheet: String, question: String, picture: Uri?): List<Message> {
        if (picture == null) return listOf(Message("system", "$INSTRUCTION\n$sheet"), Message("user", question))
        assistant.prepare()
        val (buckets, calibration) = Pair(sight.buckets, sight.calibration)
        val loaded = pictures.load(picture, buckets, calibration, question.length / 4, PICTURE_BUDGET_MS)
        val parts = listOfNotNull<Part>(loaded?.let { PicturePart(it) }, TextPart(question))
        return listOf(Message("user", parts))
    }

    private fun answer(messages: List<Message>, isPrivate: Boolean): String {
        val begunMs = SystemClock.elapsedRealtime()
        var firstMs = 0L
        val answer = assistant.ask(messages, MAX_TOKENS, isPrivate) { text ->
            if (firstMs == 0L) firstMs = SystemClock.elapsedRealtime() - begunMs
            runOnUiThread { findViewById<TextView>(R.id.answer).append(text) }
        }
        val wholeMs = SystemClock.elapsedRealtime() - begunMs
        val facts = getString(R.string.facts, answer.servedBy, firstMs, wholeMs)
        val reason = answer.fallbackReason ?: return facts
        return facts + "\n" + getString(R.string.not_by_device, reason)
    }

    /** Brings the bundle up to date, or takes the installed one where the edge or its bundle is not to be had. */
    private fun openDevice(): Generator {
        val runtimeVersion = OrtEnvironment.getEnvironment().version
        val store = BundleStore(File(filesDir, "bundles"), keys, runtimeVersion) { System.currentTimeMillis() / 1000 }
        val bundle = try {
            store.update(edge, BUNDLE) { done, total -> tellProgress(done, total) }
        } catch (error: LongshoreException) {
            store.current(BUNDLE) ?: throw error
        }
        checkRuntime(bundle.manifest, OrtEnvironment.getEnvironment().version)
        return open(bundle)
    }

    private fun open(bundle: InstalledBundle): Generator {
        val manifest = bundle.manifest
        val variant = manifest.variants.minBy { PREFERRED.indexOf(it.precision) }
        val decoder = OrtDecoder(File(bundle.folder, variant.file), manifest.kv, NUM_THREADS, manifest.vision)
        val tokenizer = Tokenizer.read(File(bundle.folder, manifest.tokenizerFile).readBytes())
        val encoder = manifest.vision?.let { OrtEncoder(File(bundle.folder, it.encoderFile), NUM_THREADS) }
        if (encoder != null) sight = Sight(manifest.visionBuckets, measure(manifest, decoder, encoder))
        return Generator(decoder, tokenizer, manifest, encoder)
    }

    /** The encoder's time at two sizes, and how fast a prompt is read; the cache's content is lost. */
    private fun measure(manifest: Manifest, decoder: OrtDecoder, encoder: OrtEncoder): VisionCalibration {
        val nowMs = { SystemClock.elapsedRealtimeNanos() / 1e6 }
        val words = IntArray(minOf(CALIBRATION_TOKENS, manifest.kv.maxTokens)) { manifest.eosTokenIds.first() }
        decoder.forward(words, 0, FloatArray(0)) // the first run allocates and is no measure
        val begunMs = nowMs()
        decoder.forward(words, 0, FloatArray(0))
        val tokensPerS = 1000.0 * words.size / maxOf(nowMs() - begunMs, 1e-3)
        return measureVision(manifest.visionBuckets, tokensPerS, nowMs) {
            encoder.encode(it, FloatBuffer.allocate(3 * it.widthPx * it.heightPx))
        }
    }

    private fun tellProgress(done: Long, total: Long) = runOnUiThread {
        show(R.id.facts, getString(R.string.downloading, done / 1000, total / 1000))
    }

    private fun show(view: Int, text: String) {
        findViewById<TextView>(view).text = text
    }
}
