"""Is this GGUF good enough to publish, and what exactly did quantization break?"""

__version__ = "0.1.0"
