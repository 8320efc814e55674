/**
 * Bundles on this device: downloaded piece by piece, gone on with where it stopped, and made current only
 * when every byte is what a trusted key signed. Whatever happens in the middle, the current one stays whole.
 */
package longshore.core

import java.io.File
import java.io.InputStream
import java.io.RandomAccessFile

private const val CURRENT_NAME = "current"
private const val LEARNT_NAME = "learnt-keys.json" // what rotation statements taught, a trust store
private const val HIGHEST_NAME = "highest" // the high-water mark: a version and its manifest's digest

class InstalledBundle(val folder: File, val manifest: Manifest)

/** `runtimeVersion` is that of the ONNX Runtime which will run the bundles; without it any is taken. */
class BundleStore(
    private val root: File,
    given: TrustedKeys,
    private val runtimeVersion: String? = null,
    private val nowS: () -> Long
) {
    private var keys = readLearnt().fold(given) { known, key -> known.with(key) }

    /** The current version of a bundle, every file checked; null if there is none that is whole. */
    fun current(name: String): InstalledBundle? {
        val pointer = File(File(root, name), CURRENT_NAME)
        if (!pointer.isFile) return null
        return try {
            read(File(File(root, name), pointer.readText().trim()))
        } catch (error: BundleException) {
            null // it is downloaded again
        }
    }

    /** Brings the edge's bundle; raises BundleException for anything that is not exactly what was signed. */
    fun update(edge: EdgeClient, name: String, progress: (Long, Long) -> Unit = { _, _ -> }): InstalledBundle {
        val body = edge.bundleFile(name, MANIFEST_NAME, 0, null) { _, stream -> bounded(stream, MAX_MANIFEST_BYTES) }
        val signature = edge.bundleFile(name, SIGNATURE_NAME, 0, null) { _, stream -> bounded(stream, 1024) }
        val manifest = readManifest(body)
        keys.check(manifest, body, String(signature), nowS())
        if (manifest.name != name) throw BundleException("asked for $name, got ${manifest.name}")
        refuseOlder(name, manifest, body)
        runtimeVersion?.let { checkRuntime(manifest, it) } // before the version that runs is replaced
        val current = current(name)
        if (current != null && current.manifest.version == manifest.version) return current
        val folder = File(File(root, name), manifest.version.toString())
        folder.mkdirs()
        val totalBytes = manifest.files.map { it.sizeBytes }.fold(0L, Long::plus)
        var doneBytes = 0L
        for (file in manifest.files) {
            val before = doneBytes
            download(edge, name, file, folder) { progress(before + it, totalBytes) }
            doneBytes += file.sizeBytes
        }
        File(folder, MANIFEST_NAME).writeBytes(body)
        File(folder, SIGNATURE_NAME).writeBytes(signature)
        val installed = read(folder)
        replace(File(root, name), HIGHEST_NAME, "${manifest.version} ${sha256(body)}")
        replace(File(root, name), CURRENT_NAME, manifest.version.toString())
        learn(manifest)
        return installed
    }

    /** What the bundle's rotation statements teach is known from now on, without them as well. */
    private fun learn(manifest: Manifest) {
        val wiser = keys.withChain(manifest.keyChain, nowS())
        if (wiser.keys.size == keys.keys.size) return
        keys = wiser
        replace(root, LEARNT_NAME, trustText(keys.learnt))
    }

    /** The keys learnt so far; none where the file can't be used, which costs no more than an update. */
    private fun readLearnt(): List<OperatorKey> {
        val file = File(root, LEARNT_NAME)
        if (!file.isFile || file.length() > MAX_TRUST_BYTES) return emptyList()
        return try {
            readTrust(file.readBytes()).learnt
        } catch (error: BundleException) {
            emptyList()
        }
    }

    /** A version below the highest ever installed, or another manifest of that one, is never taken. */
    private fun refuseOlder(name: String, manifest: Manifest, body: ByteArray) {
        val mark = File(File(root, name), HIGHEST_NAME)
        if (!mark.isFile) return
        val (version, digest) = mark.readText().trim().split(" ")
        val isOther = manifest.version == version.toLong() && sha256(body) != digest
        if (manifest.version < version.toLong() || isOther) {
            throw BundleRollback("version ${manifest.version} is not newer than $version")
        }
    }

    private fun read(folder: File): InstalledBundle {
        val manifestFile = File(folder, MANIFEST_NAME)
        if (!manifestFile.isFile) throw BundleDamaged("there is no bundle at ${folder.name}")
        val body = manifestFile.readBytes()
        val manifest = readManifest(body)
        val signature = File(folder, SIGNATURE_NAME)
        keys.check(manifest, body, if (signature.isFile) signature.readText() else "", nowS())
        for (file in manifest.files) checkFile(folder, file)
        return InstalledBundle(folder, manifest)
    }

    /** A small file's text is replaced in one step. */
    private fun replace(folder: File, file: String, text: String) {
        val incoming = File(folder, ".$file")
        incoming.writeText(text)
        if (!incoming.renameTo(File(folder, file))) throw BundleException("the store can't be written")
    }

    private fun download(edge: EdgeClient, name: String, file: BundleFile, folder: File, progress: (Long) -> Unit) {
        val target = File(folder, file.path)
        if (target.isFile && target.length() == file.sizeBytes && isWhole(folder, file)) return
        target.parentFile.mkdirs()
        val part = File(folder, file.path + ".part")
        val begin = if (part.isFile) part.inputStream().use { goodBytes(it, file) } else 0L
        edge.bundleFile(name, file.path, begin, "\"${file.sha256}\"") { isPart, stream ->
            RandomAccessFile(part, "rw").use { out ->
                out.setLength(if (isPart) begin else 0)
                out.seek(out.length())
                copyBounded(stream, out, file, progress)
            }
        }
        if (!part.renameTo(target)) throw BundleException("the store can't be written")
        try {
            checkFile(folder, file)
        } catch (error: BundleDamaged) {
            target.delete() // or the next download would go on from bad bytes
            throw error
        }
    }

    private fun copyBounded(stream: InputStream, out: RandomAccessFile, file: BundleFile, progress: (Long) -> Unit) {
        val buffer = ByteArray(READ_BYTES)
        while (true) {
            val count = stream.read(buffer)
            if (count < 0) return
            if (out.filePointer + count > file.sizeBytes) throw BundleDamaged("${file.path} is too long")
            out.write(buffer, 0, count)
            progress(out.filePointer)
        }
    }

    private fun isWhole(folder: File, file: BundleFile): Boolean = try {
        checkFile(folder, file)
        true
    } catch (error: BundleDamaged) {
        false
    }
}
