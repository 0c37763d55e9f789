"""Files in and out: Hugging Face directories, llama2.c, torch archives, released heads and image models, tokenizers.

Networks never import this package: it turns files into their configs and parameters, and back.
"""
