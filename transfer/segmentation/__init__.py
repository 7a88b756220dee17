"""Semantic segmentation: UperNet on a pre-trained encoder, through mmseg. Importing this needs no engine."""
