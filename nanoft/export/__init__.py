"""From a run to files that other tools load: merged weights, adapters and GGUF files, verified before they appear.

Read `merge` first (W + s B A in float32), then `streaming` (tensor by tensor, for models larger than memory) and
`verify` (the written files against base and adapter). `gguf` writes for llama.cpp and Ollama, with `gguf_graphs` and
`gguf_tokenizer`; `model_card` writes the documents and uploads them.
"""
