"""Emission for onnxruntime: an artifact's graph and weights as an ONNX model."""
