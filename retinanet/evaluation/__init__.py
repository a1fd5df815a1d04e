"""COCO evaluation: results against truth."""
