/** Pictures at the size that the manifest's table and this device's measured speed choose. Runs no encoder. */
package longshore.app

import android.content.ContentResolver
import android.graphics.Bitmap
import android.graphics.BitmapFactory
import android.net.Uri
import java.nio.FloatBuffer
import longshore.core.InvalidRequest
import longshore.core.VisionBucket
import longshore.core.VisionCalibration
import longshore.core.chooseBucket

private const val MAX_PIXELS = 64L * 1024 * 1024

class Pictures(private val resolver: ContentResolver) {
    /** The picture, scaled for the encoder; null for a model that takes none. */
    fun load(
        picture: Uri,
        buckets: List<VisionBucket>,
        calibration: VisionCalibration,
        numTextTokens: Int,
        budgetMs: Double
    ): Bitmap? {
        val size = BitmapFactory.Options().apply { inJustDecodeBounds = true }
        decode(picture, size)
        if (size.outWidth <= 0) throw InvalidRequest("this is no picture")
        if (size.outWidth.toLong() * size.outHeight > MAX_PIXELS) throw InvalidRequest("the picture is too large")
        val bucket = chooseBucket(buckets, size.outWidth, size.outHeight, calibration, numTextTokens, budgetMs)
            ?: return null
        val options = BitmapFactory.Options().apply { inSampleSize = sampleSize(size, bucket) }
        val decoded = decode(picture, options) ?: throw InvalidRequest("this is no picture")
        return Bitmap.createScaledBitmap(decoded, bucket.widthPx, bucket.heightPx, true)
    }

    private fun decode(picture: Uri, options: BitmapFactory.Options): Bitmap? =
        resolver.openInputStream(picture)?.use { BitmapFactory.decodeStream(it, null, options) }

    /** The largest power of two at which the decoded picture is still no smaller than the bucket. */
    private fun sampleSize(size: BitmapFactory.Options, bucket: VisionBucket): Int {
        var sample = 1
        while (size.outWidth / (2 * sample) >= bucket.widthPx && size.outHeight / (2 * sample) >= bucket.heightPx) {
            sample *= 2
        }
        return sample
    }
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
