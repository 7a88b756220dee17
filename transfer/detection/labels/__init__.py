"""Annotations as other tools write them, converted to COCO; and large annotated images cut into tiles."""
