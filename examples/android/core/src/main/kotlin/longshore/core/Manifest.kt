/** The manifest of a bundle: plain data, every field checked. Files and signatures are BundleCheck's. */
package longshore.core

const val MANIFEST_NAME = "manifest.json"
const val SIGNATURE_NAME = "manifest.sig"
const val MAX_MANIFEST_BYTES = 1024 * 1024

private const val MAX_FILES = 256
private const val MAX_FILE_BYTES = 8L * 1024 * 1024 * 1024
private const val MAX_TOKEN_ID = 2147483647L
private val SHA256 = Regex("[0-9a-f]{64}")
private val DIGEST = Regex("[0-9a-f]{32,128}")
private val PATH = Regex("[A-Za-z0-9_][A-Za-z0-9_.\\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\\-]*){0,3}")
private val VERSION = Regex("[0-9]{1,6}(\\.[0-9]{1,6}){0,3}")
private val FOLDER_NAME = Regex("[A-Za-z0-9][A-Za-z0-9_.\\-]{0,99}")

data class BundleFile(
    val path: String,
    val sizeBytes: Long,
    val sha256: String,
    val chunkBytes: Int?,
    val chunkSha256: List<String>
)

data class Affixes(val prefix: String, val suffix: String)

data class ChatTemplate(val roles: Map<String, Affixes>, val start: String, val generationPrompt: String)

data class KvGeometry(
    val numLayers: Int,
    val numKvHeads: Int,
    val headDim: Int,
    val maxTokens: Int,
    val dtype: String
)

/** `prefillFile` reads prompts faster, with the weights that lie in `file`; nothing is lost without it but time. */
data class Variant(val name: String, val file: String, val precision: String, val prefillFile: String?)

data class VisionBucket(val widthPx: Int, val heightPx: Int, val numTokens: Int)

/** How pictures enter a prompt: the encoder's graph, and the token that each of its rows stands for. */
data class VisionGeometry(val encoderFile: String, val imageTokenId: Int, val unitPx: Int, val hiddenSize: Int)

data class Manifest(
    val name: String,
    val version: Long,
    val modelDigest: String,
    val files: List<BundleFile>,
    val variants: List<Variant>,
    val tokenizerFile: String,
    val kv: KvGeometry,
    val template: ChatTemplate,
    val eosTokenIds: List<Int>,
    val minOnnxruntime: String,
    val visionBuckets: List<VisionBucket>,
    val vision: VisionGeometry?,
    val keyId: String?,
    val expiresAtS: Long?,
    val keyChain: List<String>
) {
    fun file(path: String): BundleFile = files.first { it.path == path }
}

/** The manifest in `body`; raises BundleDamaged with the field at fault. */
fun readManifest(body: ByteArray): Manifest {
    if (body.size > MAX_MANIFEST_BYTES) throw BundleDamaged("the manifest is too large")
    val value = try {
        parseJson(body)
    } catch (error: JsonException) {
        throw BundleDamaged("the manifest is not JSON: ${error.message}")
    }
    val manifest = manifestOf(Fields("manifest", value))
    checkPaths(manifest)
    manifest.vision?.let { checkBuckets(it, manifest.visionBuckets) }
    return manifest
}

private fun manifestOf(fields: Fields): Manifest = fields.read {
    longOr("format_version", 1, 1L..1L)
    long("opset", 13L..100L)
    objectOrNull("capabilities")
    Manifest(
        name = folderName("name"),
        version = long("version", 1L..(1L shl 53)),
        modelDigest = text("model_digest", 128, DIGEST),
        files = list("files", 1..MAX_FILES) { fileOf(it) },
        variants = list("variants", 1..16) { variantOf(it) },
        tokenizerFile = path("tokenizer_file"),
        kv = kvOf(child("kv")),
        template = templateOf(child("chat_template")),
        eosTokenIds = longs("eos_token_ids", 1..16, 0L..MAX_TOKEN_ID).map { it.toInt() },
        minOnnxruntime = text("min_onnxruntime", 40, VERSION),
        visionBuckets = listOr("vision_buckets", 64) { bucketOf(it) },
        vision = childOrNull("vision")?.let { visionOf(it) },
        keyId = textOrNull("key_id", 64),
        expiresAtS = longOrNull("expires_at", 0L..(1L shl 53)),
        keyChain = textsOr("key_chain", 8, Regex("(?s).{0,$MAX_STATEMENT_CHARS}"))
    )
}

private fun Fields.folderName(name: String): String {
    val found = text(name, 100, FOLDER_NAME)
    return if (found.endsWith(".")) throw BundleDamaged("$name can't name a folder") else found
}

private fun Fields.path(name: String): String {
    val path = text(name, 200, PATH)
    if (path.split("/").any { it.endsWith(".") }) throw BundleDamaged("$path has a part that ends with a dot")
    if (folded(path) == MANIFEST_NAME || folded(path) == SIGNATURE_NAME) throw BundleDamaged("$path is no file")
    return path
}

internal fun fileOf(fields: Fields): BundleFile = fields.read {
    val chunkBytes = longOrNull("chunk_bytes", 4096L..(1L shl 30))
    val file = BundleFile(
        path("path"),
        long("size_bytes", 0L..MAX_FILE_BYTES),
        text("sha256", 64, SHA256),
        chunkBytes?.toInt(),
        textsOr("chunk_sha256", 65536, SHA256)
    )
    val numChunks = if (chunkBytes == null) 0 else (file.sizeBytes + chunkBytes - 1) / chunkBytes
    if (file.chunkSha256.size.toLong() != numChunks) throw BundleDamaged("${file.path}: wrong number of chunks")
    file
}

private fun variantOf(fields: Fields): Variant = fields.read {
    textOr("graph", "traced", 10, Regex("traced|built"))
    textsOr("required_operators", 200, Regex(".{1,100}"))
    val prefillFile = if (textOrNull("prefill_file", 200) == null) null else path("prefill_file")
    Variant(text("name", 100), path("file"), text("precision", 10, Regex("fp32|int8|int4")), prefillFile)
}

private fun kvOf(fields: Fields): KvGeometry = fields.read {
    KvGeometry(
        int("num_layers", 1024),
        int("num_kv_heads", 1024),
        int("head_dim", 4096),
        int("max_tokens", 1024 * 1024),
        textOr("dtype", "float32", 10, Regex("float32|float16|int8"))
    )
}

private fun templateOf(fields: Fields): ChatTemplate = fields.read {
    anyText("jinja", 100_000)
    val roles = LinkedHashMap<String, Affixes>()
    for (role in child("roles").each(8)) roles[role.name] = role.read { Affixes(anyText("prefix"), anyText("suffix")) }
    ChatTemplate(roles, textOr("start", "", 1000), textOr("generation_prompt", "", 1000))
}

private fun bucketOf(fields: Fields): VisionBucket = fields.read {
    VisionBucket(int("width_px", 8192), int("height_px", 8192), int("num_tokens", 65536))
}

private fun visionOf(fields: Fields): VisionGeometry = fields.read {
    VisionGeometry(
        path("encoder_file"),
        long("image_token_id", 0L..MAX_TOKEN_ID).toInt(),
        int("unit_px", 1024),
        int("hidden_size", 65536)
    )
}

/** An encoder needs sizes to run at, each a whole number of its units and with the tokens that makes. */
private fun checkBuckets(vision: VisionGeometry, buckets: List<VisionBucket>) {
    if (buckets.isEmpty()) throw BundleDamaged("an encoder has no size")
    if (buckets.map { it.widthPx to it.heightPx }.toSet().size != buckets.size) throw BundleDamaged("a size stands twice")
    for ((width, height, numTokens) in buckets) {
        val isWhole = width % vision.unitPx == 0 && height % vision.unitPx == 0
        if (!isWhole || numTokens.toLong() != (width / vision.unitPx).toLong() * (height / vision.unitPx)) {
            throw BundleDamaged("$width x $height is not $numTokens units of ${vision.unitPx} pixels")
        }
    }
}

private fun checkPaths(manifest: Manifest) {
    val paths = manifest.files.map { it.path }.toSet()
    val folds = paths.map { folded(it) }.toSet() // some file systems know no case
    if (folds.size != manifest.files.size) throw BundleDamaged("a path stands twice")
    for (path in folds) {
        val parts = path.split("/")
        for (count in 1 until parts.size) {
            if (parts.take(count).joinToString("/") in folds) throw BundleDamaged("$path lies below a file")
        }
    }
    if (manifest.variants.map { it.name }.toSet().size != manifest.variants.size) {
        throw BundleDamaged("a variant stands twice")
    }
    val graphs = manifest.variants.flatMap { listOfNotNull(it.file, it.prefillFile) }
    for (needed in graphs + listOfNotNull(manifest.tokenizerFile, manifest.vision?.encoderFile)) {
        if (needed !in paths) throw BundleDamaged("$needed is not listed")
    }
}

private fun folded(path: String): String = path.map { Character.toLowerCase(it) }.joinToString("")
