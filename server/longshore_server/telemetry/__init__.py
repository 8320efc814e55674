"""What the core tells about itself: probes of host and GPU, and the metrics that it exports."""
