/** The edge over HTTP: bundle files with Range, and chat answers as a stream of events. Chooses nothing. */
package longshore.core

import java.io.BufferedReader
import java.io.IOException
import java.io.InputStream
import java.net.HttpURLConnection
import java.net.URL

private const val MAX_LINE_CHARS = 1024 * 1024
private const val MAX_ERROR_BYTES = 64 * 1024

class EdgeClient(
    private val baseUrl: String,
    private val apiKey: String,
    private val connectTimeoutMs: Int = 5_000,
    private val readTimeoutMs: Int = 30_000
) {
    /** A file of a bundle from `begin` on: true if the edge sends just that, false if it sends the whole. */
    fun <T> bundleFile(bundle: String, path: String, begin: Long, etag: String?, use: (Boolean, InputStream) -> T): T {
        val connection = open("/bundles/$bundle/$path")
        connection.setRequestProperty("Accept-Encoding", "identity")
        if (begin > 0 && etag != null) {
            connection.setRequestProperty("Range", "bytes=$begin-")
            connection.setRequestProperty("If-Range", etag)
        }
        return answered(connection) {
            val isPart = connection.responseCode == 206
            val range = connection.getHeaderField("Content-Range") ?: ""
            if (isPart && !range.startsWith("bytes $begin-")) {
                throw EdgeException("protocol_error", "the edge sent another part than was asked for", 206)
            }
            use(isPart, connection.inputStream)
        }
    }

    /** Asks the edge's tiers; each piece of text goes to `emit`. Gives who served it, as the report says. */
    fun chat(body: Map<String, Any?>, emit: (String) -> Unit): String {
        val connection = open("/v1/chat/completions")
        connection.requestMethod = "POST"
        connection.doOutput = true
        connection.setRequestProperty("Content-Type", "application/json")
        return answered(connection, toJson(body + ("stream" to true)).toByteArray()) {
            readEvents(connection.inputStream.bufferedReader(), emit)
        }
    }

    private fun open(path: String): HttpURLConnection {
        val connection = URL(baseUrl.trimEnd('/') + path).openConnection() as HttpURLConnection
        connection.connectTimeout = connectTimeoutMs
        connection.readTimeout = readTimeoutMs
        connection.instanceFollowRedirects = false // the key is for this edge alone
        connection.setRequestProperty("Authorization", "Bearer $apiKey")
        return connection
    }

    private fun <T> answered(connection: HttpURLConnection, body: ByteArray? = null, use: () -> T): T {
        try {
            if (body != null) connection.outputStream.use { it.write(body) }
            if (connection.responseCode !in 200..206) throw refusal(connection)
            return use()
        } catch (error: IOException) {
            throw EdgeException("connection_failed", "the edge did not answer: ${error.message}", 0)
        } finally {
            connection.disconnect()
        }
    }

    private fun refusal(connection: HttpURLConnection): EdgeException {
        val body = connection.errorStream?.use { it.readBounded() } ?: ByteArray(0)
        val error = try {
            (parseJson(body) as? Map<*, *>)?.get("error") as? Map<*, *>
        } catch (problem: JsonException) {
            null
        }
        return EdgeException(
            error?.get("code") as? String ?: "upstream_failed",
            error?.get("message") as? String ?: "the edge answered ${connection.responseCode}",
            connection.responseCode
        )
    }

    private fun InputStream.readBounded(): ByteArray {
        val buffer = ByteArray(MAX_ERROR_BYTES)
        var size = 0
        while (size < buffer.size) {
            val count = read(buffer, size, buffer.size - size)
            if (count < 0) break
            size += count
        }
        return buffer.copyOf(size)
    }

    private fun readEvents(lines: BufferedReader, emit: (String) -> Unit): String {
        var servedBy = "edge"
        var event = "message"
        while (true) {
            val line = lines.readBoundedLine()
                ?: throw EdgeException("answer_interrupted", "the answer broke off", 0)
            when {
                line == "" -> event = "message"
                line.startsWith("event:") -> event = line.substring(6).trim()
                line.startsWith("data:") -> {
                    val data = line.substring(5).trim()
                    if (data == "[DONE]") return servedBy
                    servedBy = readChunk(data, event, emit) ?: servedBy
                }
            }
        }
    }

    /** Who served the answer, where the chunk says so. */
    private fun readChunk(data: String, event: String, emit: (String) -> Unit): String? {
        val chunk = try {
            parseJson(data) as Map<*, *>
        } catch (error: Exception) {
            throw EdgeException("protocol_error", "the edge sent something that is no chunk", 0)
        }
        if (event == "error") {
            val error = chunk["error"] as? Map<*, *>
            throw EdgeException(error?.get("code") as? String ?: "upstream_failed", "${error?.get("message")}", 0)
        }
        for (choice in chunk["choices"] as? List<*> ?: emptyList<Any>()) {
            val delta = (choice as? Map<*, *>)?.get("delta") as? Map<*, *>
            val text = delta?.get("content") as? String
            if (!text.isNullOrEmpty()) emit(text)
        }
        val report = (chunk["longshore"] as? Map<*, *>)?.get("report") as? Map<*, *>
        return report?.get("served_by") as? String
    }

    private fun BufferedReader.readBoundedLine(): String? {
        val line = StringBuilder()
        while (true) {
            val char = read()
            if (char < 0) return null
            if (char == '\n'.hashCode()) return line.toString().removeSuffix("\r")
            line.append(char.toChar())
            if (line.length > MAX_LINE_CHARS) throw EdgeException("protocol_error", "a line is too long", 0)
        }
    }
}
