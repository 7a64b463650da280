"""OpenVINO: image encoders on Intel's and other processors, GPUs and NPUs."""
