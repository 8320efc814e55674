/** Which of the manifest's image sizes to use: the largest whose answer begins inside the time budget. */
package longshore.core

/**
 * What was measured on this device: the encoder's time at two sizes, and how fast a prompt is read.
 * Between and beyond the two sizes the encoder's time is a straight line in pixels.
 */
data class VisionCalibration(
    val smallPixels: Long,
    val smallEncodeMs: Double,
    val largePixels: Long,
    val largeEncodeMs: Double,
    val prefillTokensPerS: Double
) {
    /** The expected time until the answer begins, with `numTextTokens` of text beside the image. */
    fun predictedMs(bucket: VisionBucket, numTextTokens: Int): Double {
        val pixels = bucket.widthPx.toDouble() * bucket.heightPx
        val slope = (largeEncodeMs - smallEncodeMs) / maxOf(1L, largePixels - smallPixels)
        val encodeMs = maxOf(0.0, smallEncodeMs + slope * (pixels - smallPixels))
        return encodeMs + 1000.0 * (bucket.numTokens + numTextTokens) / prefillTokensPerS
    }
}

/** Times `encode` at the smallest and at the largest size, after a run that does not count; `nowMs` is a clock. */
fun measureVision(
    buckets: List<VisionBucket>,
    prefillTokensPerS: Double,
    nowMs: () -> Double,
    encode: (VisionBucket) -> Unit
): VisionCalibration {
    val bySize = buckets.sortedBy { it.widthPx.toLong() * it.heightPx }
    encode(bySize.first())
    val (small, large) = listOf(bySize.first(), bySize.last()).map { bucket ->
        val begunMs = nowMs()
        encode(bucket)
        Pair(bucket.widthPx.toLong() * bucket.heightPx, nowMs() - begunMs)
    }
    return VisionCalibration(small.first, small.second, large.first, large.second, prefillTokensPerS)
}

/**
 * The bucket with the most pixels that fits the budget and does not enlarge the image more than is needed;
 * where none fits, the quickest. Null for a model that takes no images.
 */
fun chooseBucket(
    buckets: List<VisionBucket>,
    imageWidthPx: Int,
    imageHeightPx: Int,
    calibration: VisionCalibration,
    numTextTokens: Int,
    budgetMs: Double
): VisionBucket? {
    val bySize = buckets.sortedBy { it.widthPx.toLong() * it.heightPx }
    val enough = bySize.firstOrNull { it.widthPx >= imageWidthPx && it.heightPx >= imageHeightPx }
    val useful = if (enough == null) bySize else bySize.subList(0, bySize.indexOf(enough) + 1)
    return useful.lastOrNull { calibration.predictedMs(it, numTextTokens) <= budgetMs }
        ?: bySize.firstOrNull()
}
