/** Checks a bundle's files, byte by byte, and its runtime; signatures are Trust's. Downloads and runs nothing. */
package longshore.core

import java.io.ByteArrayOutputStream
import java.io.File
import java.io.InputStream
import java.security.MessageDigest

internal const val READ_BYTES = 64 * 1024
private const val BASE64URL = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"

/** Raises BundleIncompatible if the bundle needs a newer ONNX Runtime than `runtimeVersion`. */
fun checkRuntime(manifest: Manifest, runtimeVersion: String) {
    val (have, need) = listOf(runtimeVersion, manifest.minOnnxruntime).map(::versionParts)
    for (index in 0 until 3) {
        if (have[index] > need[index]) return
        if (have[index] < need[index]) {
            throw BundleIncompatible("it needs ONNX Runtime ${manifest.minOnnxruntime}, not $runtimeVersion")
        }
    }
}

private fun versionParts(version: String): List<Int> =
    (Regex("[0-9]+").findAll(version).map { it.value.toInt() }.toList() + listOf(0, 0, 0)).take(3)

/** Raises BundleDamaged unless the file in `folder` has exactly the bytes that the manifest names. */
fun checkFile(folder: File, file: BundleFile) {
    val path = File(folder, file.path)
    if (!path.isFile) throw BundleDamaged("${file.path} is missing")
    if (path.length() != file.sizeBytes) throw BundleDamaged("${file.path} does not have ${file.sizeBytes} bytes")
    val digest = MessageDigest.getInstance("SHA-256")
    path.inputStream().use { stream ->
        val buffer = ByteArray(1024 * 1024)
        while (true) {
            val count = stream.read(buffer)
            if (count < 0) break
            digest.update(buffer, 0, count)
        }
    }
    if (hex(digest.digest()) != file.sha256) throw BundleDamaged("${file.path} is damaged")
}

fun sha256(data: ByteArray): String = hex(MessageDigest.getInstance("SHA-256").digest(data))

fun hex(data: ByteArray): String = data.joinToString("") { String.format("%02x", it) }

/** The bytes of canonical unpadded base64url, or null for anything else; java.util.Base64 needs Android 8. */
fun decodeBase64Url(text: String): ByteArray? {
    if (text.length % 4 == 1) return null
    val out = ByteArrayOutputStream(text.length)
    var bits = 0
    var numBits = 0
    for (char in text) {
        val value = BASE64URL.indexOf(char)
        if (value < 0) return null
        bits = (bits shl 6) or value
        numBits += 6
        if (numBits >= 8) {
            numBits -= 8
            out.write(bits shr numBits)
            bits = bits and ((1 shl numBits) - 1)
        }
    }
    return if (bits == 0) out.toByteArray() else null
}

/** How much of a broken download is good: whole pieces whose digests are those of the manifest. */
internal fun goodBytes(part: InputStream, file: BundleFile): Long {
    var good = 0L
    for (digest in file.chunkSha256) {
        val chunk = bounded(part, file.chunkBytes!!)
        if (sha256(chunk) != digest) return good
        good += chunk.size
    }
    return if (good < file.sizeBytes) good else 0
}

/** Up to `most` bytes of a stream, what follows left in it. */
internal fun bounded(stream: InputStream, most: Int): ByteArray {
    val out = ByteArrayOutputStream()
    val buffer = ByteArray(minOf(most, READ_BYTES))
    while (out.size() < most) {
        val count = stream.read(buffer, 0, minOf(buffer.size, most - out.size()))
        if (count < 0) break
        out.write(buffer, 0, count)
    }
    return out.toByteArray()
}
