/** Pictures made ready at the size that the manifest's table and this device's measured speed choose. */
package longshore.app

import android.content.ContentResolver
import android.graphics.Bitmap
import android.graphics.BitmapFactory
import android.graphics.Canvas
import android.graphics.Color
import android.graphics.Matrix
import android.media.ExifInterface
import android.net.Uri
import android.util.Base64
import java.io.ByteArrayOutputStream
import java.nio.FloatBuffer
import java.security.MessageDigest
import longshore.core.InvalidRequest
import longshore.core.Picture
import longshore.core.VisionBucket
import longshore.core.VisionCalibration
import longshore.core.chooseBucket

private const val MAX_PIXELS = 64L * 1024 * 1024
private const val UPLOAD_SIDE_PX = 1536
private const val JPEG_QUALITY = 90

class Pictures(private val resolver: ContentResolver) {
    /**
     * The picture upright, scaled for the encoder and as a JPEG for the edge, without its metadata; null for a
     * model that takes none. Raises InvalidRequest for what is no picture, or too large to be decoded.
     */
    fun load(
        picture: Uri,
        buckets: List<VisionBucket>,
        calibration: VisionCalibration,
        numTextTokens: Int,
        budgetMs: Double
    ): Picture? {
        val size = BitmapFactory.Options().apply { inJustDecodeBounds = true }
        decode(picture, size)
        if (size.outWidth <= 0) throw InvalidRequest("this is no picture")
        if (size.outWidth.toLong() * size.outHeight > MAX_PIXELS) throw InvalidRequest("the picture is too large")
        val options = BitmapFactory.Options().apply { inSampleSize = sampleSize(size) }
        val decoded = decode(picture, options) ?: throw InvalidRequest("this is no picture")
        val upright = upright(onWhite(decoded), orientation(picture))
        val bucket = chooseBucket(buckets, upright.width, upright.height, calibration, numTextTokens, budgetMs)
            ?: return null
        val jpeg = ByteArrayOutputStream().also { upright.compress(Bitmap.CompressFormat.JPEG, JPEG_QUALITY, it) }
        val scaled = Bitmap.createScaledBitmap(upright, bucket.widthPx, bucket.heightPx, true)
        val dataUrl = "data:image/jpeg;base64," + Base64.encodeToString(jpeg.toByteArray(), Base64.NO_WRAP)
        return Picture(keyOf(jpeg.toByteArray(), bucket), bucket, planesOf(scaled), dataUrl)
    }

    private fun decode(picture: Uri, options: BitmapFactory.Options): Bitmap? =
        resolver.openInputStream(picture)?.use { BitmapFactory.decodeStream(it, null, options) }

    private fun orientation(picture: Uri): Int = resolver.openInputStream(picture)?.use {
        ExifInterface(it).getAttributeInt(ExifInterface.TAG_ORIENTATION, ExifInterface.ORIENTATION_NORMAL)
    } ?: ExifInterface.ORIENTATION_NORMAL

    /** The least power of two at which neither side is over what is sent to an edge. */
    private fun sampleSize(size: BitmapFactory.Options): Int {
        var sample = 1
        while (maxOf(size.outWidth, size.outHeight) / sample > UPLOAD_SIDE_PX) sample *= 2
        return sample
    }
}

private fun keyOf(jpeg: ByteArray, bucket: VisionBucket): String {
    val digest = MessageDigest.getInstance("SHA-256").digest(jpeg).joinToString("") { "%02x".format(it) }
    return "$digest ${bucket.widthPx} ${bucket.heightPx}"
}

private fun onWhite(bitmap: Bitmap): Bitmap {
    if (!bitmap.hasAlpha()) return bitmap
    val flat = Bitmap.createBitmap(bitmap.width, bitmap.height, Bitmap.Config.ARGB_8888)
    Canvas(flat).apply { drawColor(Color.WHITE) }.drawBitmap(bitmap, 0f, 0f, null)
    return flat
}

private fun upright(bitmap: Bitmap, orientation: Int): Bitmap {
    val turn = Matrix()
    when (orientation) { // the degrees are clockwise; a mirrored picture is turned first
        ExifInterface.ORIENTATION_FLIP_HORIZONTAL -> turn.postScale(-1f, 1f)
        ExifInterface.ORIENTATION_ROTATE_180 -> turn.postRotate(180f)
        ExifInterface.ORIENTATION_FLIP_VERTICAL -> turn.postScale(1f, -1f)
        ExifInterface.ORIENTATION_TRANSPOSE -> turn.apply { postRotate(90f) }.postScale(-1f, 1f)
        ExifInterface.ORIENTATION_ROTATE_90 -> turn.postRotate(90f)
        ExifInterface.ORIENTATION_TRANSVERSE -> turn.apply { postRotate(-90f) }.postScale(-1f, 1f)
        ExifInterface.ORIENTATION_ROTATE_270 -> turn.postRotate(270f)
        else -> return bitmap
    }
    return Bitmap.createBitmap(bitmap, 0, 0, bitmap.width, bitmap.height, turn, true)
}

/** [3, height, width], red, green and blue from -1 to 1. */
fun planesOf(bitmap: Bitmap): FloatBuffer {
    val pixels = IntArray(bitmap.width * bitmap.height)
    bitmap.getPixels(pixels, 0, bitmap.width, 0, 0, bitmap.width, bitmap.height)
    val planes = FloatBuffer.allocate(3 * pixels.size)
    for (shift in intArrayOf(16, 8, 0)) for (pixel in pixels) planes.put((pixel shr shift and 0xff) / 127.5f - 1f)
    planes.rewind()
    return planes
}
