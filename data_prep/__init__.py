"""One command a corpus: ``python -m data_prep {text8,enwik8,wikitext103,text,embedded} --out DIR``."""
