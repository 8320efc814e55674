/** The one screen: a sheet, a question, the answer, and who gave it. */
package longshore.app

import ai.onnxruntime.OrtEnvironment
import android.app.Activity
import android.os.Bundle
import android.os.SystemClock
import android.widget.Button
import android.widget.CheckBox
import android.widget.EditText
import android.widget.TextView
import java.io.File
import java.util.concurrent.Executors
import longshore.core.Assistant
import longshore.core.BundleStore
import longshore.core.EdgeClient
import longshore.core.EdgeException
import longshore.core.Generator
import longshore.core.InstalledBundle
import longshore.core.LongshoreException
import longshore.core.Message
import longshore.core.Tokenizer
import longshore.core.TrustedKeys
import longshore.core.checkRuntime

private const val BUNDLE = "shop-student"
private const val MODEL = "shop"
private const val MAX_TOKENS = 96
private const val NUM_THREADS = 2
private const val INSTRUCTION = "You answer questions about this product sheet."
private val PREFERRED = listOf("int4", "int8", "fp32")

class MainActivity : Activity() {
    private val worker = Executors.newSingleThreadExecutor()
    private val edge = EdgeClient(BuildConfig.EDGE_URL, BuildConfig.API_KEY)
    private val keys = TrustedKeys(mapOf(BuildConfig.KEY_ID to BuildConfig.PUBLIC_KEY))
    private val assistant by lazy { Assistant(edge, MODEL) { openDevice() } }

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        setContentView(R.layout.main)
        findViewById<Button>(R.id.ask).setOnClickListener { ask() }
    }

    override fun onDestroy() {
        worker.shutdown()
        super.onDestroy()
    }

    private fun ask() {
        val sheet = findViewById<EditText>(R.id.sheet).text
        val question = findViewById<EditText>(R.id.question).text.toString()
        val isPrivate = findViewById<CheckBox>(R.id.is_private).isChecked
        val messages = listOf(Message("system", "$INSTRUCTION\n$sheet"), Message("user", question))
        findViewById<Button>(R.id.ask).isEnabled = false
        show(R.id.answer, "")
        show(R.id.facts, "")
        worker.execute {
            val facts = try {
                answer(messages, isPrivate)
            } catch (error: LongshoreException) {
                getString(R.string.failed, error.code, error.message)
            }
            runOnUiThread {
                show(R.id.facts, facts)
                findViewById<Button>(R.id.ask).isEnabled = true
            }
        }
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

    /** Brings the bundle up to date, or takes the installed one where the edge can't be reached. */
    private fun openDevice(): Generator {
        val store = BundleStore(File(filesDir, "bundles"), keys) { System.currentTimeMillis() / 1000 }
        val bundle = try {
            store.update(edge, BUNDLE) { done, total -> tellProgress(done, total) }
        } catch (error: EdgeException) {
            store.current(BUNDLE) ?: throw error
        }
        checkRuntime(bundle.manifest, OrtEnvironment.getEnvironment().version)
        return open(bundle)
    }

    private fun open(bundle: InstalledBundle): Generator {
        val manifest = bundle.manifest
        val variant = manifest.variants.minBy { PREFERRED.indexOf(it.precision) }
        val decoder = OrtDecoder(File(bundle.folder, variant.file), manifest.kv, NUM_THREADS)
        val tokenizer = Tokenizer.read(File(bundle.folder, manifest.tokenizerFile).readBytes())
        return Generator(decoder, tokenizer, manifest)
    }

    private fun tellProgress(done: Long, total: Long) = runOnUiThread {
        show(R.id.facts, getString(R.string.downloading, done / 1000, total / 1000))
    }

    private fun show(view: Int, text: String) {
        findViewById<TextView>(view).text = text
    }
}
