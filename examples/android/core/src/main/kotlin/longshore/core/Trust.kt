/** Which keys may sign bundles: public keys with their times, revocations, rotation from old to new. Keeps no file. */
package longshore.core

const val MAX_TRUST_BYTES = 256 * 1024
const val MAX_STATEMENT_CHARS = 2048
private const val MAX_KEYS = 64
private const val MAX_REVOKED = 256
private const val MAX_SIGNATURE_CHARS = 1024
private const val LATEST_S = 1L shl 53
private val ROTATION_PREFIX = "longshore-key-rotation-1\n".toByteArray(Charsets.US_ASCII)
private val KEY_ID = Regex("[A-Za-z0-9][A-Za-z0-9_.\\-]{0,63}")

/** A public key, 32 bytes as unpadded base64url, that counts from `notBeforeS` until just before `expiresAtS`. */
data class OperatorKey(
    val keyId: String,
    val publicKey: String,
    val notBeforeS: Long? = null,
    val expiresAtS: Long? = null,
    val introducedBy: String? = null
)

/** The keys that this app trusts; `revoked` ids count no more, nor do keys that those introduced. */
class TrustedKeys(val keys: List<OperatorKey>, private val revoked: List<String> = emptyList()) {
    init {
        require(keys.all { decodeBase64Url(it.publicKey)?.size == 32 }) { "no key" }
        require(keys.map { it.keyId }.toSet().size == keys.size) { "a key stands twice" }
    }

    /** Keys by id, without an end. */
    constructor(keys: Map<String, String>) : this(keys.map { OperatorKey(it.key, it.value) })

    /** Those that rotation statements taught. */
    val learnt: List<OperatorKey> get() = keys.filter { it.introducedBy != null }

    /** Raises BundleException unless a good key signed exactly these bytes and they have not expired. */
    fun check(manifest: Manifest, body: ByteArray, signature: String, nowS: Long) {
        val key = try {
            withChain(manifest.keyChain, nowS).keyFor(manifest.keyId, nowS)
        } catch (error: BundleException) {
            throw BundleException("bundle ${manifest.name} ${error.message}")
        }
        val bytes = if (signature.length > MAX_SIGNATURE_CHARS) null else decodeBase64Url(signature.removeSuffix("\n"))
        if (bytes == null || !verifies(key, bytes, body)) {
            throw BundleException("bundle ${manifest.name}: the signature does not fit the manifest")
        }
        if (manifest.expiresAtS != null && nowS >= manifest.expiresAtS) {
            throw BundleException("bundle ${manifest.name} has expired")
        }
    }

    /** The good key of that id; BundleException says why there is none. */
    fun keyFor(keyId: String?, nowS: Long): OperatorKey {
        val key = find(keyId ?: "") ?: throw BundleException("is not signed by a trusted key")
        val line = arrayListOf(key.keyId) // the key, who introduced it, who introduced that one
        var introducer = key.introducedBy
        while (introducer != null && introducer !in line) {
            line.add(introducer)
            introducer = find(introducer)?.introducedBy
        }
        if (line.any { it in revoked }) throw BundleException("is signed by the key ${key.keyId}, which is revoked")
        if (key.notBeforeS != null && nowS < key.notBeforeS) {
            throw BundleException("is signed by the key ${key.keyId}, which does not count yet")
        }
        if (key.expiresAtS != null && nowS >= key.expiresAtS) {
            throw BundleException("is signed by the key ${key.keyId}, which has expired")
        }
        return key
    }

    /** With the keys that rotation statements teach; what does not verify teaches nothing. */
    fun withChain(statements: List<String>, nowS: Long): TrustedKeys =
        statements.fold(this) { keys, text -> keys.learn(text, nowS)?.let { keys.with(it) } ?: keys }

    /** With one more key, unless its id is known or revoked or there are too many. */
    fun with(key: OperatorKey): TrustedKeys {
        val isTaken = find(key.keyId) != null || key.keyId in revoked
        return if (isTaken || keys.size >= MAX_KEYS) this else TrustedKeys(keys + key, revoked)
    }

    private fun find(keyId: String) = keys.firstOrNull { it.keyId == keyId }

    private fun learn(text: String, nowS: Long): OperatorKey? {
        val payload = decodeBase64Url(text.substringBefore("."))
        val signature = decodeBase64Url(text.substringAfter(".", ""))
        if (text.length > MAX_STATEMENT_CHARS || payload == null || signature == null) return null
        return try {
            val (oldKeyId, newKey) = statementOf(Fields("statement", parseJson(payload)))
            val isSigned = verifies(keyFor(oldKeyId, nowS), signature, ROTATION_PREFIX + payload)
            if (isSigned) newKey.copy(introducedBy = oldKeyId) else null
        } catch (error: JsonException) {
            null
        } catch (error: BundleException) {
            null
        }
    }

    private fun verifies(key: OperatorKey, signature: ByteArray, payload: ByteArray) =
        Ed25519.verifies(decodeBase64Url(key.publicKey)!!, signature, payload)
}

/** A trust store as `longshore bundle trust` writes it; raises BundleDamaged for anything else. */
fun readTrust(body: ByteArray): TrustedKeys {
    if (body.size > MAX_TRUST_BYTES) throw BundleDamaged("the trust store is too large")
    val value = try {
        parseJson(body)
    } catch (error: JsonException) {
        throw BundleDamaged("the trust store is not JSON: ${error.message}")
    }
    return trustOf(Fields("trust store", value))
}

internal fun trustOf(fields: Fields): TrustedKeys = fields.read {
    longOr("format_version", 1, 1L..1L)
    val keys = listOr("keys", MAX_KEYS) { keyOf(it) }
    if (keys.map { it.keyId }.toSet().size != keys.size) throw BundleDamaged("a key stands twice")
    TrustedKeys(keys, textsOr("revoked", MAX_REVOKED, KEY_ID))
}

/** What `readTrust` reads. */
fun trustText(keys: List<OperatorKey>): String {
    val plain = keys.map { key ->
        val all = linkedMapOf(
            "key_id" to key.keyId,
            "public_key" to key.publicKey,
            "not_before" to key.notBeforeS,
            "expires_at" to key.expiresAtS,
            "introduced_by" to key.introducedBy
        )
        all.filterValues { it != null }
    }
    return toJson(linkedMapOf("keys" to plain, "format_version" to 1))
}

private fun statementOf(fields: Fields): Pair<String, OperatorKey> = fields.read {
    longOr("format_version", 1, 1L..1L)
    Pair(text("old_key_id", 64, KEY_ID), keyOf(child("new_key")))
}

private fun keyOf(fields: Fields): OperatorKey = fields.read {
    val publicKey = text("public_key", 43)
    if (decodeBase64Url(publicKey)?.size != 32) throw BundleDamaged("public_key is no key")
    OperatorKey(
        text("key_id", 64, KEY_ID),
        publicKey,
        longOrNull("not_before", 0L..LATEST_S),
        longOrNull("expires_at", 0L..LATEST_S),
        textOrNull("introduced_by", 64)?.also { if (!KEY_ID.matches(it)) throw BundleDamaged("$it is no key id") }
    )
}
