/**
 * Ed25519 signatures (RFC 8032, section 5.1.7): the platform's where it has them, else in plain arithmetic,
 * since older Android has none. Only verifies; holds no secret, so nothing needs constant time.
 */
package longshore.core

import java.math.BigInteger
import java.security.GeneralSecurityException
import java.security.KeyFactory
import java.security.MessageDigest
import java.security.Signature
import java.security.spec.X509EncodedKeySpec

object Ed25519 {
    private val TWO = BigInteger.valueOf(2)
    private val P = TWO.pow(255) - BigInteger.valueOf(19)
    private val ORDER = TWO.pow(252) + BigInteger("27742317777372353535851937790883648493")
    private val D = (BigInteger.valueOf(-121665) * BigInteger.valueOf(121666).modInverse(P)).mod(P)
    private val ROOT_OF_MINUS_ONE = TWO.modPow((P - BigInteger.ONE) / BigInteger.valueOf(4), P)
    private val BASE = pointOf(littleEndian(BigInteger.valueOf(4) * BigInteger.valueOf(5).modInverse(P) % P))!!

    // The fixed head of a SubjectPublicKeyInfo with an Ed25519 key (RFC 8410).
    private val KEY_PREFIX = byteArrayOf(0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00)

    /** True if `signature` is the key's over `payload`; false for keys and signatures of a wrong length. */
    fun verifies(key: ByteArray, signature: ByteArray, payload: ByteArray): Boolean {
        if (key.size != 32 || signature.size != 64) return false
        return try {
            verifiesOnPlatform(key, signature, payload)
        } catch (error: GeneralSecurityException) {
            verifiesInArithmetic(key, signature, payload)
        }
    }

    /** By the platform's provider; raises GeneralSecurityException where it has none. */
    fun verifiesOnPlatform(key: ByteArray, signature: ByteArray, payload: ByteArray): Boolean {
        val publicKey = KeyFactory.getInstance("Ed25519").generatePublic(X509EncodedKeySpec(KEY_PREFIX + key))
        val verifier = Signature.getInstance("Ed25519")
        verifier.initVerify(publicKey)
        verifier.update(payload)
        return try {
            verifier.verify(signature)
        } catch (error: java.security.SignatureException) {
            false // not a signature at all
        }
    }

    /** The same in BigInteger arithmetic. */
    fun verifiesInArithmetic(key: ByteArray, signature: ByteArray, payload: ByteArray): Boolean {
        val r = signature.copyOfRange(0, 32)
        val s = number(signature.copyOfRange(32, 64))
        val point = pointOf(key)
        if (point == null || s >= ORDER) return false
        val digest = MessageDigest.getInstance("SHA-512").digest(r + key + payload)
        val k = number(digest).mod(ORDER)
        val sum = add(times(BASE, s), times(negated(point), k))
        return encoded(sum).contentEquals(r)
    }

    /** A point in extended coordinates: x = X/Z, y = Y/Z, T = XY/Z. */
    private class Point(val x: BigInteger, val y: BigInteger, val z: BigInteger, val t: BigInteger)

    private fun add(one: Point, other: Point): Point {
        val a = ((one.y - one.x) * (other.y - other.x)).mod(P)
        val b = ((one.y + one.x) * (other.y + other.x)).mod(P)
        val c = (TWO * one.t * other.t * D).mod(P)
        val d = (TWO * one.z * other.z).mod(P)
        val e = b - a
        val f = d - c
        val g = d + c
        val h = b + a
        return Point((e * f).mod(P), (g * h).mod(P), (f * g).mod(P), (e * h).mod(P))
    }

    private fun times(point: Point, factor: BigInteger): Point {
        var sum = Point(BigInteger.ZERO, BigInteger.ONE, BigInteger.ONE, BigInteger.ZERO)
        for (bit in factor.bitLength() - 1 downTo 0) {
            sum = add(sum, sum)
            if (factor.testBit(bit)) sum = add(sum, point)
        }
        return sum
    }

    private fun negated(point: Point) = Point(P - point.x, point.y, point.z, P - point.t)

    private fun encoded(point: Point): ByteArray {
        val inverse = point.z.modInverse(P)
        val data = littleEndian((point.y * inverse).mod(P))
        if ((point.x * inverse).mod(P).testBit(0)) data[31] = (data[31].toInt() or 0x80).toByte()
        return data
    }

    /** The point that 32 bytes encode, or null where there is none (RFC 8032, section 5.1.3). */
    private fun pointOf(data: ByteArray): Point? {
        val whole = number(data)
        val isOdd = whole.testBit(255)
        val y = whole.clearBit(255)
        if (y >= P) return null
        val u = (y * y - BigInteger.ONE).mod(P)
        val v = (D * y * y + BigInteger.ONE).mod(P)
        val square = (u * v.modInverse(P)).mod(P)
        var x = square.modPow((P + BigInteger.valueOf(3)) / BigInteger.valueOf(8), P)
        if ((x * x).mod(P) != square) x = (x * ROOT_OF_MINUS_ONE).mod(P)
        if ((x * x).mod(P) != square || (x.signum() == 0 && isOdd)) return null
        if (x.testBit(0) != isOdd) x = P - x
        return Point(x, y, BigInteger.ONE, (x * y).mod(P))
    }

    private fun number(data: ByteArray) = BigInteger(1, data.reversedArray())

    private fun littleEndian(value: BigInteger): ByteArray {
        val data = ByteArray(32)
        val bytes = value.toByteArray().reversedArray()
        for (index in 0 until minOf(32, bytes.size)) data[index] = bytes[index]
        return data
    }
}
