"""Export: merged weights, ONNX, and the comparison of what ships with what was tuned."""
