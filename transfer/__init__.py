"""Transfer of a pre-trained encoder to detection and segmentation."""
