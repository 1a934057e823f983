"""Text to batches: corpora, tokenizers, the token cache, held-out splits, packing and the loader."""

from megalodon.data.cache import TokenizeProgress, cache_root, open_tokenized, tokenize
from megalodon.data.corpus import Corpus, CorpusConfig, Document
from megalodon.data.documents import DocumentSet
from megalodon.data.loader import Batch, Loader, Origin, held_out_batches
from megalodon.data.mixture import Mixture, another_text
from megalodon.data.named_tokenizer import load_tokenizer
from megalodon.data.reading import TextFile, read_text
from megalodon.data.split import HeldOutConfig, check_sizes, prepare_documents, split_documents, without_shared
from megalodon.data.tokenized import TokenizedCorpus, check_vocabulary
from megalodon.data.tokenizer import ByteTokenizer, StreamDecoder, Tokenizer, same_tokens

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "CorpusConfig",
    "Document",
    "DocumentSet",
    "HeldOutConfig",
    "Loader",
    "Mixture",
    "Origin",
    "StreamDecoder",
    "TextFile",
    "TokenizeProgress",
    "TokenizedCorpus",
    "Tokenizer",
    "another_text",
    "cache_root",
    "check_sizes",
    "check_vocabulary",
    "held_out_batches",
    "load_tokenizer",
    "open_tokenized",
    "prepare_documents",
    "read_text",
    "same_tokens",
    "split_documents",
    "tokenize",
    "without_shared",
]
