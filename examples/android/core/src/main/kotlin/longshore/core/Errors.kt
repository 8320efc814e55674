/** The errors of the device, by the codes that every tier uses. */
package longshore.core

/** Anything that a caller may have to explain to a person; `code` is the stable name. */
open class LongshoreException(val code: String, message: String) : Exception(message)

open class BundleException(message: String, code: String = "bundle_invalid") : LongshoreException(code, message)

class BundleDamaged(message: String) : BundleException(message, "bundle_damaged")

class BundleIncompatible(message: String) : BundleException(message, "bundle_incompatible")

class BundleRollback(message: String) : BundleException(message, "bundle_rollback")

class InvalidRequest(message: String) : LongshoreException("invalid_request", message)

class UnsupportedParameter(message: String) : LongshoreException("unsupported_parameter", message)

class PromptTooLong(message: String) : LongshoreException("context_length_exceeded", message)

class DeviceFailed(message: String) : LongshoreException("device_failed", message)

/** What an edge said, or that it could not be reached; `status` is 0 without an HTTP answer. */
class EdgeException(code: String, message: String, val status: Int) : LongshoreException(code, message)
