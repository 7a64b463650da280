"""Devices with streams: what TensorRT and ONNX Runtime on CUDA share."""
