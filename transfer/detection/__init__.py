"""Object detection and instance segmentation from a pre-trained encoder."""
