"""Every word the pages say, in Chinese and English. A key stands in both or in neither (tested)."""

from __future__ import annotations

from typing import Literal

InterfaceLanguage = Literal["zh", "en"]
LANGUAGES: dict[InterfaceLanguage, str] = {"en": "English", "zh": "中文"}

_TEXTS: dict[str, tuple[str, str]] = {
    # key: (English, Chinese)
    "title": ("Ask your documents", "问你的文档"),
    "tagline": (
        "On this machine, from your own files, with the place each sentence comes from.",
        "在本机上，根据你自己的文件作答，每句话都注明出处。",
    ),
    "chat": ("Chat", "问答"),
    "knowledge": ("Knowledge base", "知识库"),
    "language": ("Language", "界面语言"),
    "ask_placeholder": ("Ask a question about your documents", "就文档内容提问"),
    "you": ("You", "你"),
    "answer": ("Answer", "回答"),
    "try_one": ("Questions to start with", "可以先问这些"),
    "add_own": ("Add your own documents", "添加自己的文档"),
    "see_inside": ("See how the model reads and writes", "看看模型怎样读和写"),
    # stages of an answer
    "queued": ("Waiting: {count} before this one", "排队中，前面还有 {count} 个问题"),
    "next": ("Next in line", "下一个就轮到"),
    "loading": ("Loading the models, once after a start", "正在加载模型，启动后只需一次"),
    "searching": ("Searching the documents", "正在检索文档"),
    "reading": ("Reading {count} passages", "正在阅读 {count} 个段落"),
    "writing": ("Writing", "正在作答"),
    "stop": ("Stop", "停止"),
    "stopped": ("Stopped", "已停止"),
    "stopped_note": (
        "You stopped this answer. What was written so far has not been checked against the sources.",
        "回答已被你停止。已写出的部分没有和原文核对。",
    ),
    "failed": ("No answer", "没能回答"),
    "unexpected": (
        "Something went wrong inside the program ({name}). The terminal it was started from shows where.",
        "程序内部出错（{name}）。详细信息见启动它的终端窗口。",
    ),
    # kinds of answers
    "generated": ("Written by the model", "由模型撰写"),
    "generated_note": ("Each sentence was compared with its source.", "每句话都已和出处核对。"),
    "quoted": ("Quoted from the source", "摘自原文"),
    "quoted_note": (
        "The model was not sure enough of its own words, so this is what fits best, word for word.",
        "模型对自己的表述把握不足，这里直接给出文档中最切题的原句。",
    ),
    "doubtful_note": (
        "The documents may not answer this; what comes nearest is shown.",
        "文档里未必有直接的答案，这里给出的是最接近的内容。",
    ),
    "refused": ("Not in the documents", "文档中没有"),
    "refused_note": (
        "Nothing that was found supports an answer. The nearest passages are below.",
        "检索到的内容都不足以支持一个答案。下面是最接近的段落。",
    ),
    "unsupported_note": (
        "Underlined with dots: no passage supports this.",
        "带点下划线的句子在检索到的段落里找不到依据。",
    ),
    "cut_note": (
        "The answer reached its longest length and ends here.",
        "回答已达到长度上限，到此为止。",
    ),
    "searched_for": ("Searched for", "检索内容"),
    "change_search": (
        "What is searched for; the question stays as it is",
        "修改检索用的文字，问题本身不变",
    ),
    "search_again": ("Search and answer again", "重新检索并作答"),
    # documents that disagree
    "disagree": ("The documents disagree", "文档说法不一"),
    "disagree_line": ("“{words}” in {path}", "{path} 写的是“{words}”"),
    # sources
    "sources": ("Sources", "出处"),
    "nearest": ("Nearest passages", "最接近的段落"),
    "also_found": ("Also found, not cited", "检索到但未引用"),
    "page": ("page {number}", "第 {number} 页"),
    "score": ("relevance", "相关度"),
    "dense": ("meaning", "语义"),
    "bm25": ("words", "词语"),
    "characters": ("characters {start}–{end}", "第 {start}–{end} 字"),
    "changed_since": (
        "This file has been changed or removed since the answer; this is the passage as it was.",
        "这个文件在回答之后被修改或删除，这里显示的是当时的段落。",
    ),
    "page_picture": ("The page", "原页"),
    "page_missing": (
        "The file itself is no longer where it was read from, or it has changed since.",
        "原文件已不在读取时的位置，或者内容已有变化。",
    ),
    "page_unmarked": (
        "The passage could not be found on the page picture, so nothing is marked on it.",
        "没能在页面图像上定位这段文字，因此没有标出。",
    ),
    "go_to_passage": ("Go to the passage", "跳到引用处"),
    "download_source": ("Download the file", "下载原文件"),
    # what it cost
    "what_happened": ("What happened", "过程"),
    "retrieval": ("search", "检索"),
    "prefill": ("prefill", "预填充"),
    "decode": ("decode", "解码"),
    "check": ("checks", "核对"),
    "first_token": ("first token after", "首个词元用时"),
    "about": ("about {value}", "约 {value}"),
    "brief_tokens": ("{count} tokens", "{count} 个词元"),
    "model_memory": ("memory of the model", "模型占用内存"),
    "cache_memory": ("KV cache in use", "KV 缓存已用"),
    "of": ("{part} of {whole}", "{part} / 上限 {whole}"),
    "passage": ("passage", "段落"),
    "scores_note": (
        "Meaning is the cosine of the vectors, words the BM25 share; relevance weighs both and ranks.",
        "“语义”是向量的余弦，“词语”是 BM25 的得分占比；“相关度”综合两者，用来排序。",
    ),
    "prompt_tokens": ("prompt tokens", "提示词元"),
    "reused_tokens": ("of them reused from the KV cache", "其中复用 KV 缓存"),
    "new_tokens": ("tokens written", "生成词元"),
    "tokens_per_second": ("tokens a second", "词元/秒"),
    "device": ("device", "设备"),
    "model": ("model", "模型"),
    "confidence": ("confidence", "把握"),
    "seconds": ("{seconds} s", "{seconds} 秒"),
    "no_model": (
        "The search alone settled it; the model was not asked.",
        "检索结果已足以判断，没有调用模型。",
    ),
    # actions
    "ask_again": ("Ask again", "再问一次"),
    "edit": ("Edit the question", "修改问题"),
    "send": ("Ask", "提问"),
    "copy": ("Copy", "复制"),
    "copied": ("Copied", "已复制"),
    "new_conversation": ("New conversation", "新对话"),
    "conversations": ("Conversations", "对话记录"),
    "search_conversations": ("Search in conversations", "搜索对话"),
    "no_conversation": ("No conversation holds this.", "没有包含它的对话。"),
    "rename": ("Rename", "重命名"),
    "delete": ("Delete", "删除"),
    "export": ("Export as Markdown", "导出为 Markdown"),
    # which files
    "scope": ("Which files", "限定文件"),
    "scope_any": ("all", "全部"),
    "scope_folders": ("Folders", "文件夹"),
    "scope_types": ("Types", "类型"),
    "scope_name": ("Names", "文件名"),
    "scope_since": ("Changed on this day or later", "修改日期不早于"),
    "scope_until": ("Changed on this day or earlier", "修改日期不晚于"),
    "scope_count": ("{count} of {total} files are asked", "在 {total} 个文件中检索 {count} 个"),
    "scope_not_used": ("Until this is set right, all files are asked.", "改正之前，仍检索全部文件。"),
    "scope_line": ("Only in: {parts}", "仅限：{parts}"),
    "scope_from_day": ("from {day}", "{day} 起"),
    "scope_to_day": ("to {day}", "{day} 止"),
    # settings
    "settings": ("Settings", "设置"),
    "kb_folder": ("Folder of the knowledge base", "知识库文件夹"),
    "generator": ("Model: bundled, a folder, or a Hugging Face name", "模型：bundled、文件夹或 Hugging Face 名称"),
    "apply": ("Apply", "应用"),
    "top_k": ("Passages given to the model", "交给模型的段落数"),
    "temperature": ("Temperature (0 always takes the likeliest word)", "温度（0 表示总取最可能的词）"),
    "temperature_short": ("Temperature", "温度"),
    "top_p": ("Top-p", "Top-p"),
    "max_new_tokens": ("Longest answer, in tokens", "回答的最大词元数"),
    "holds": ("{files} files, {chunks} passages", "{files} 个文件，{chunks} 个段落"),
    "loaded": ("{name} on {device}, {dtype}", "{name}，设备 {device}，{dtype}"),
    "not_loaded": ("{name} (loaded with the first answer)", "{name}（首次回答时加载）"),
    "loading_model": ("Loading {name}", "正在加载 {name}"),
    "kept_model": (
        "The model before it, {name}, stays in use.",
        "仍使用之前的模型 {name}。",
    ),
    # no knowledge base
    "no_kb": ("There is no knowledge base yet", "还没有知识库"),
    "no_kb_note": (
        "A knowledge base is made from a folder of documents. In a terminal:",
        "知识库由一个文件夹里的文档建成。在终端里运行：",
    ),
    "build_handbook": ("Build the handbook that comes with the program", "用自带的手册建立知识库"),
    "build_handbook_note": (
        "Documents in Chinese and English on how language models and this kind of search work.",
        "中英文文档，介绍语言模型和这种检索问答的原理。",
    ),
    "building": ("Reading and indexing documents", "正在读取文档并建立索引"),
    "empty_kb": (
        "The knowledge base holds no passages. Add documents on the page “Knowledge base”.",
        "知识库里还没有内容。请在“知识库”页面添加文档。",
    ),
    # knowledge base page
    "kept_in_milvus": ("Kept in Milvus: {uri}", "存放于 Milvus：{uri}"),
    "files": ("Files", "文件"),
    "file": ("File", "文件"),
    "status": ("Status", "状态"),
    "pages_column": ("Pages", "页数"),
    "chunks_column": ("Passages", "段落数"),
    "size": ("Size", "大小"),
    "notes": ("Notes", "说明"),
    "ok": ("read", "已读取"),
    "with_notes": ("read, see notes", "已读取，见说明"),
    "failed_file": ("not read", "未能读取"),
    "size_of_files": ("in documents", "文档大小"),
    "size_on_disk": ("index on disk", "索引占用"),
    "choose_kb": ("Knowledge base in use", "当前知识库"),
    "new_kb": ("New knowledge base", "新建知识库"),
    "new_kb_name": ("Name of its folder", "文件夹名称"),
    "create": ("Create", "新建"),
    "found_in": ("{count} passages in {milliseconds} ms", "{count} 个段落，用时 {milliseconds} 毫秒"),
    "files_done": ("{done} of {total} files", "{done} / {total} 个文件"),
    "running_for": ("{seconds} s so far", "已用 {seconds} 秒"),
    "up_to_date": ("The knowledge base is up to date", "知识库已更新"),
    "failed_files": ("not read", "未读取"),
    "try_search": ("Try the search", "试一试检索"),
    "try_search_placeholder": ("Words or a question; no answer is written", "输入词语或问题，只检索，不作答"),
    "nothing_found": ("Nothing was found.", "什么也没找到。"),
    "add_files": ("Add files", "添加文件"),
    "add_files_note": (
        "Or drop them here: {types} and more. At a time at most {count} files and {total} MB, {size} MB each.",
        "也可以拖放到这里：{types} 等格式。一次最多 {count} 个文件，共 {total} MB，每个不超过 {size} MB。",
    ),
    "add": ("Add to the knowledge base ({count})", "加入知识库（{count}）"),
    "resync_title": ("Folders", "文件夹"),
    "resync": ("Read the folders again", "重新读取文件夹"),
    "resync_note": (
        "Takes in what was added, changed or deleted in: {folders}",
        "更新以下文件夹中新增、修改和删除的文件：{folders}",
    ),
    "remove": ("Remove uploaded files", "删除上传的文件"),
    "remove_choose": ("Choose files", "选择文件"),
    "delete_files": ("Delete {count}", "删除 {count} 个"),
    "remove_note": (
        "Only files that were uploaded here can be removed here. Others are deleted in their folder.",
        "这里只能删除在本页上传的文件，其他文件请在原文件夹中删除。",
    ),
    "too_many": (
        "{count} files of {size} MB were given; at most {limit} files and {most} MB are taken at a time. Nothing was stored.",
        "一次给了 {count} 个文件，共 {size} MB；一次最多 {limit} 个，共 {most} MB。没有保存任何文件。",
    ),
    "rejected": ("Not taken: {count}", "未接收：{count} 个"),
    "and_more": ("and {count} more", "另有 {count} 个"),
    "too_large": ("it has {size} MB, at most {limit} MB are taken", "大小 {size} MB，上限 {limit} MB"),
    "empty_file": ("it is empty", "文件是空的"),
    "leftover": (
        "it is what an editor leaves beside a file, not the file itself",
        "这是编辑器留下的临时或备份文件，不是文件本身",
    ),
    "same_name": (
        "another file of this name is among those just given; rename one of them",
        "这次上传的文件里已有同名的，请给其中一个改名",
    ),
    "wrong_type": ("no reader for this kind of file", "不支持这种文件"),
    "not_what_it_says": (
        "its content is not what its ending says",
        "文件内容与扩展名不符",
    ),
    "added": ("{count} added", "新增 {count}"),
    "changed": ("{count} changed", "修改 {count}"),
    "moved": ("{count} moved", "移动 {count}"),
    "deleted": ("{count} deleted", "删除 {count}"),
    "unchanged": ("{count} unchanged", "未变 {count}"),
    "failed_count": ("{count} not read", "未能读取 {count}"),
    "nothing_to_do": ("Nothing to do: there are no files.", "没有文件，无需更新。"),
    "choose_files": ("Choose files", "选择文件"),
    "choose_folder": ("Choose a folder", "选择文件夹"),
    # look inside
    "inside": ("Look inside", "看看内部"),
    "inside_note": (
        "How the loaded model reads a question with its passages and writes, token by token.",
        "已加载的模型怎样读入问题和段落，又怎样一个词元一个词元地写出来。",
    ),
    "inside_question": ("A question about your documents", "就文档提一个问题"),
    "inside_run": ("Read and write", "读入并作答"),
    "inside_large": (
        "This loads a second copy of the model, {size}, in full precision.",
        "这会以全精度再加载一份模型，权重大小 {size}。",
    ),
    "inside_nothing": ("Nothing was found for this question, so there is no prompt.", "没有检索到内容，因此没有提示。"),
    "inside_written": ("What the model writes by itself", "模型自己写出的内容"),
    "inside_written_note": (
        "Greedy, before any check: {prompt} prompt tokens, {new} new ones.",
        "贪心解码，未经任何核对：提示 {prompt} 个词元，生成 {new} 个。",
    ),
    "exact_prompt": ("The exact prompt", "完整的提示"),
    "tokens": ("Tokens", "词元"),
    "tokens_note": (
        "The question as the model reads it. Each box is one token with its number in the vocabulary.",
        "模型读到的问题。每个方框是一个词元，下面是它在词表里的编号。",
    ),
    "attention": ("Where attention goes", "注意力去了哪里"),
    "attention_note": (
        "Each row is a written token, each column a part of the prompt: the question with any instructions, the passages, and what was written before. The stronger the colour, the more attention that part got.",
        "每行是一个写出的词元，每列是提示的一部分：问题（连同指令）、各段落、以及之前已写出的内容。颜色越重，得到的注意力越多。",
    ),
    "leaned_on": (
        "Of the attention that went to passages, most went to passage {passage}: {share}.",
        "落在各段落上的注意力中，第 {passage} 段得到最多：{share}。",
    ),
    "layer": ("Layer", "层"),
    "head": ("Head", "头"),
    "average": ("average", "平均"),
    "part_rest": ("question", "问题"),
    "part_passage": ("[{number}]", "[{number}]"),
    "part_written": ("written", "已写出"),
    "token": ("token", "词元"),
    "part": ("part", "部分"),
    "share": ("share", "占比"),
    "next_token": ("The next token", "下一个词元"),
    "next_token_note": (
        "The likeliest tokens at one step. Temperature reshapes the probabilities; top-k and top-p decide which can be drawn at all.",
        "某一步最可能的词元。温度改变概率的分布，top-k 和 top-p 决定哪些词元可能被抽中。",
    ),
    "step": ("Step", "步"),
    "probability": ("probability", "概率"),
    "can_be_drawn": ("can be drawn", "可能被抽中"),
    "cut_off": ("cut off", "被截去"),
    "cache": ("Size of the KV cache", "KV 缓存的大小"),
    "cache_note": (
        "This model keeps {each} a token: 2 × {layers} layers × {kv_heads} KV heads × {dim} dimensions × 2 bytes. The other lines show it with as many KV heads as query heads (MHA) and with one (MQA).",
        "这个模型每个词元占 {each}：2 × {layers} 层 × {kv_heads} 个 KV 头 × {dim} 维 × 2 字节。另外两条线是 KV 头与查询头一样多（MHA）和只有一个（MQA）时的大小。",
    ),
    "this_model": ("this model", "这个模型"),
    "tokens_axis": ("tokens", "词元数"),
    "shared": ("What two prompts share", "两个提示共用的部分"),
    "shared_note": (
        "Keys and values of the same beginning are computed once and serve both. Green is what the two have in common.",
        "开头相同的部分，键和值只算一次，两个提示共用。绿色是相同的部分。",
    ),
    "shared_question": ("Another question to compare with", "再输入一个问题，与上面的比较"),
    "shared_found": (
        "The first {count} of {total} tokens are the same: {saved} of cache that need not be computed again.",
        "{total} 个词元中前 {count} 个相同，这 {saved} 的缓存不用重算。",
    ),
    "weights": ("How the weights are spread", "权重的分布"),
    "weights_note": (
        "The share of each module's numbers by their value. Narrow curves hold many numbers near zero; they lose least when rounded to fewer bits.",
        "各模块的数值按大小的分布。曲线越窄，接近零的数越多，量化到更少位数时损失越小。",
    ),
    "weight_value": ("value of a weight", "权重的值"),
    "parameters": ("Parameters by module", "各模块的参数量"),
    "parameters_note": (
        "{total} parameters. In small models the embedding table weighs most, in large ones the feed-forward layers.",
        "共 {total} 个参数。小模型里词嵌入表占得最多，大模型里前馈层占得最多。",
    ),
    "module": ("module", "模块"),
    "rope": ("Rotary positions", "旋转位置编码"),
    "rope_note": (
        "cos(position × frequency) for each pair of dimensions. The first pairs turn fast and tell neighbours apart, the last ones turn slowly and reach far. Base {theta}.",
        "每对维度上 cos(位置 × 频率) 的值。前面的维度转得快，分辨相邻的词元；后面的转得慢，照顾远距离。底数为 {theta}。",
    ),
    "rope_missing": ("This model does not use rotary positions.", "这个模型没有使用旋转位置编码。"),
    "position": ("position", "位置"),
    "dimension": ("pair of dimensions", "维度对"),
    # access
    "password": ("Password", "密码"),
    "enter": ("Enter", "进入"),
    "wrong_password": ("That is not the password.", "密码不对。"),
    "locked": (
        "Too many attempts. Try again in {seconds} seconds.",
        "尝试次数过多，请在 {seconds} 秒后再试。",
    ),
    "exposed": (
        "This page can be reached from other machines, and no password is set. Start it again with "
        "the environment variable RAG_PASSWORD, or for this machine alone with --server.address 127.0.0.1.",
        "其他机器可以访问本页面，但没有设置密码。请设置环境变量 RAG_PASSWORD 后重新启动；只在本机使用时，加上 --server.address 127.0.0.1。",
    ),
}

KEYS = tuple(_TEXTS)


def text(language: InterfaceLanguage, key: str, **values: object) -> str:
    """The words for `key`, with `values` put in."""
    english, chinese = _TEXTS[key]
    chosen = chinese if language == "zh" else english
    return chosen.format(**values) if values else chosen


def language_of_locale(locale: str | None) -> InterfaceLanguage:
    """The interface language for a browser's locale such as "zh-CN"; English where it is unknown."""
    return "zh" if (locale or "").lower().startswith("zh") else "en"


def number(value: float, digits: int = 0) -> str:
    """A number for people: 12,345 or 0.12."""
    return f"{value:,.{digits}f}"
