"""Detectors as ONNX files: written, compared with their checkpoints, and run."""
