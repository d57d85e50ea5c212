"""An encoder like BERT, compiled and run: several texts of different lengths as one ragged batch.

    python examples/encoder.py

Makes a tiny random BERT, so that nothing is downloaded; put the path of a real one in its place.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

import qcompiler
from qcompiler.options import CompileOptions
from qcompiler.pipeline import compile_model

TOKENIZER = Path(__file__).parent / "models" / "tiny-llama" / "tokenizer.json"


def random_bert(folder: Path) -> Path:
    """A checkpoint folder as transformers writes it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=2048, **sizes)).save_pretrained(folder)
    shutil.copy(TOKENIZER, folder)
    return folder


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        source, artifact = random_bert(Path(work) / "bert"), Path(work) / "bert-8bit"
        compile_model(CompileOptions(str(source), method="hqq", bits=8, output=artifact))
        model = qcompiler.load(artifact)
        texts = ["A dark and stormy night", "A stormy, dark night", "Tax forms"]
        vectors = torch.stack(model.encode(texts, pooling="mean"))
        similarity = torch.nn.functional.normalize(vectors, dim=1) @ vectors[0] / vectors[0].norm()
        for text, value in zip(texts, similarity.tolist(), strict=True):
            print(f"{value:6.3f}  {text}")
