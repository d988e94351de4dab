"""Where expert bytes live: device, pinned host memory, file. The Python face of the C++/CUDA core."""
