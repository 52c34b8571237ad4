"""A folder of small local tasks of every type, in two languages where a type has languages."""

from pathlib import Path

import pandas as pd

# Topic -> English and German sentences about it; sentences of one topic share words, others do not.
SENTENCES = {
    "bread": (
        ["The baker kneads the dough", "Fresh bread comes from the oven", "Flour and yeast make the dough rise",
         "The oven bakes bread at night"],
        ["Der Bäcker knetet den Teig", "Frisches Brot kommt aus dem Ofen", "Mehl und Hefe lassen den Teig gehen",
         "Der Ofen backt nachts das Brot"],
    ),
    "train": (
        ["The train leaves the station", "Passengers wait on the platform", "The railway crosses the bridge",
         "A conductor checks every ticket"],
        ["Der Zug verlässt den Bahnhof", "Reisende warten am Bahnsteig", "Die Bahn fährt über die Brücke",
         "Ein Schaffner prüft jede Fahrkarte"],
    ),
    "storm": (
        ["Heavy rain floods the street", "Thunder follows the lightning", "The wind breaks old branches",
         "Dark clouds bring a storm"],
        ["Starker Regen flutet die Straße", "Donner folgt auf den Blitz", "Der Wind bricht alte Äste",
         "Dunkle Wolken bringen ein Gewitter"],
    ),
}  # fmt: skip
LANGS = ("eng", "deu")


def texts(lang: str) -> list[tuple[str, str]]:
    """(topic, sentence) of one language."""
    return [(topic, text) for topic, both in SENTENCES.items() for text in both[LANGS.index(lang)]]


def write(frame: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path, index=False)


def make_local_tasks(folder: Path) -> Path:
    """One task of every type, split ``test`` (and ``train`` for classification)."""
    make_retrieval(folder / "retrieval" / "topics")
    make_reranking(folder / "reranking" / "pick")
    rows = [{"text": text, "label": topic, "lang": lang} for lang in LANGS for topic, text in texts(lang)]
    even = [{**row, "split": "train" if number % 2 else "test"} for number, row in enumerate(rows)]
    write(pd.DataFrame([row for row in even if row["lang"] == "eng" or row["split"] == "test"]),
          folder / "classification" / "topic.parquet")  # fmt: skip
    write(pd.DataFrame([{**row, "split": "test"} for row in rows if row["lang"] == "eng"]),
          folder / "clustering" / "groups.parquet")  # fmt: skip
    pairs = [
        {"sentence1": one, "sentence2": other, "same": topic == against, "near": 4.0 * (topic == against) + number % 3 / 4,
         "lang": lang, "split": "test"}
        for lang in LANGS
        for number, (topic, one) in enumerate(texts(lang))
        for against, other in texts(lang)[number + 1 : number + 5]
    ]  # fmt: skip
    frame = pd.DataFrame(pairs)
    write(frame.rename(columns={"near": "score"}).drop(columns="same"), folder / "sts" / "near.parquet")
    labels = frame["same"].map({True: "entailment", False: "contradiction"})
    labels[0] = "neutral"
    write(
        frame.assign(label=labels).drop(columns=["same", "near"]),
        folder / "pair_classification" / "nli.parquet",
    )
    translated = [
        {"sentence1": german, "sentence2": english, "lang1": "deu", "lang2": "eng", "split": "test"}
        for (_, english), (_, german) in zip(texts("eng"), texts("deu"), strict=True)
    ]
    write(pd.DataFrame(translated), folder / "bitext" / "pairs.parquet")
    return folder


def make_retrieval(folder: Path) -> Path:
    """The first sentence of a topic asks for the others; German queries also for the English ones."""
    corpus, queries, qrels, crossed = [], [], [], []
    for lang in LANGS:
        for topic, both in SENTENCES.items():
            head, *rest = both[LANGS.index(lang)]
            queries.append({"id": f"{lang}:{topic}", "text": head, "lang": lang, "split": "test"})
            for number, text in enumerate(rest):
                document = f"{lang}:{topic}:{number}"
                corpus.append(
                    {"id": document, "text": text, "title": topic if lang == "eng" else "", "lang": lang}
                )
                qrels.append({"query_id": f"{lang}:{topic}", "doc_id": document, "score": 1})
                if lang == "eng":
                    crossed.append({"query_id": f"deu:{topic}", "doc_id": document, "score": 1})
    for name, rows in (("corpus", corpus), ("queries", queries), ("qrels", qrels), ("qrels_to_eng", crossed)):
        write(pd.DataFrame(rows), folder / f"{name}.parquet")
    return folder


def make_reranking(folder: Path) -> Path:
    """Four candidates a query, one of its own topic."""
    corpus = [
        {"id": f"d{n}", "text": text, "title": "", "lang": "eng"} for n, (_, text) in enumerate(texts("eng"))
    ]
    queries, qrels = [], []
    for number, (topic, both) in enumerate(SENTENCES.items()):
        queries.append({"id": topic, "text": f"{topic}: {both[0][0]}", "lang": "eng", "split": "test"})
        start = 4 * number
        for offset, grade in ((1, 1), (5, 0), (6, 0), (9, 0)):
            qrels.append({"query_id": topic, "doc_id": f"d{(start + offset) % 12}", "score": grade})
    for name, rows in (("corpus", corpus), ("queries", queries), ("qrels", qrels)):
        write(pd.DataFrame(rows), folder / f"{name}.parquet")
    return folder
