"""Cell2Text: from the gene counts of a cell to a description in words.

Two halves never import each other and meet only in files: the cells half (anndata, scanpy) and the language half
(torch, transformers, peft).
"""
