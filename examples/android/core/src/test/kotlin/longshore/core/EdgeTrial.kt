/**
 * Drives the store, the client and the fallback against a real edge, for the tests: one JSON object with an
 * action on each line of standard input, one with what came of it on each line of standard output.
 */
package longshore.core

import java.io.File

/** A device that says `ids` and then breaks. */
private class Breaking(private val ids: List<Int>) : Decoder {
    private var next = 0

    override fun forward(tokenIds: IntArray, numPast: Int, features: FloatArray): FloatArray {
        if (next == ids.size) throw DeviceFailed("it broke")
        return FloatArray(4096).also { it[ids[next++]] = 1f }
    }
}

private class Trial(private val job: Map<*, *>) {
    private val edge = EdgeClient(text("edge"), text("key"))
    private val trust = trustOf(Fields("trust", job["trust"]))
    private val store = BundleStore(File(text("store")), trust, job["runtime"] as String?) { job["now_s"] as Long }

    fun run(): Map<String, Any?> = try {
        when (job["do"]) {
            "update" -> update()
            "current" -> mapOf("version" to store.current(text("bundle"))?.manifest?.version)
            else -> ask()
        }
    } catch (error: LongshoreException) {
        mapOf("error" to error.code)
    }

    private fun update(): Map<String, Any?> {
        val progress = ArrayList<Long>()
        val installed = store.update(edge, text("bundle")) { done, _ -> progress.add(done) }
        val manifest = installed.manifest
        return mapOf("version" to manifest.version, "key_id" to manifest.keyId, "progress" to progress.take(1))
    }

    private fun ask(): Map<String, Any?> {
        val installed = store.current(text("bundle"))!!
        val tokenizer = Tokenizer.read(File(installed.folder, installed.manifest.tokenizerFile).readBytes())
        val ids = (job["ids"] as List<*>).map { (it as Long).toInt() }
        val assistant = Assistant(edge, "shop") { Generator(Breaking(ids), tokenizer, installed.manifest) }
        val messages = (job["messages"] as List<*>).map {
            val message = it as Map<*, *>
            Message(message["role"] as String, message["content"] as String)
        }
        val said = StringBuilder()
        val answer = assistant.ask(messages, 64, job["private"] == true) { said.append(it) }
        return mapOf("text" to answer.text, "said" to "$said", "by" to answer.servedBy, "why" to answer.fallbackReason)
    }

    private fun text(name: String) = job[name] as String
}

fun main() {
    for (line in generateSequence { readLine() }) println(toJson(Trial(parseJson(line) as Map<*, *>).run()))
}
