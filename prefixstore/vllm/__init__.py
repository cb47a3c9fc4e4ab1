"""The border to vLLM; the only package that imports torch or vllm."""
