"""serve=true of stage=explore: the page at 127.0.0.1, with the models themselves behind it.

The page has two engines. Its own runs ONNX in the browser; this server is the other one, which a page uses when its manifest has
`"server": "/api"`. It is that page's only host, so all addresses are relative.

    GET  /                 the page, text/html
    POST /api/encode       a picture -> its codes
    POST /api/decode       codes -> pixels
    POST /api/complete     codes, of which some are to be drawn -> a stream of codes

Codes are whole numbers in [0, K), flat, in the order of Tokenizer's (h, w), (h, w, num_codebooks) or (1, L): row by row, and at
each place one per codebook. Pixels are bytes, (height, width, shown) in C order, `shown` being 1 (grey) or 3 (RGB) as
in the manifest: what Tokenizer.decode_codes returns as a Pillow image, to the bit.

encode: the body is an image file as it was dropped or pasted, or one that the page wrote (PNG), of any Content-Type image/* or
application/octet-stream. It is read, turned, scaled and cut as the images in training were. Answers JSON

    {"codes": [...], "width": 64, "height": 64, "pixels": "<base64 of the pixels that the encoder sees>"}

decode: Content-Type application/json. Answers application/octet-stream, the pixels of all grids one after the other.

    {"codes": [[...], [...]]}     1 to 64 grids; a single one may stand without the outer brackets

complete: Content-Type application/json. Answers application/x-ndjson, one object a line as the codes are drawn.

    {"codes": [...], "known": [...], "seed": 0, "label": 3, "sampler": {"temperature": 1.0, "top_k": 0}}

    known      true or 1 for each place whose codes stay, h * w of them (of codes that are a row, L); left out: all are drawn.
               `codes` may be left out with it
    seed       0 to 4294967295; with nothing known it is sample 0 of stage=sample with this seed and these settings
    label      of a prior of classes: the number of a class, or -1 for none; left out: -1
    condition  of a prior of vectors: numbers as [0.5, 2], or {"column": value}; left out: none
    sampler    settings of conf/sampler but grid, init_image, rows, region and compile; what is left out is as there

    {"places": [0, 1], "codes": [17, 4]}      drawn in this step: places in the flat codes. A later line may draw a place again
    {"codes": [...], "done": true}            the last line: all codes
    {"error": "..."}                          instead of it, if something fails on the way

Closing the connection (AbortController) ends the drawing after its step. A prior draws for one request at a time; decoding goes on
meanwhile.

What is refused has the status 400 (bad input), 403 (a host or origin that isn't this machine's), 404, 405, 411, 413 (over 64 MiB, or
over 1 MiB of JSON), 415 or 500, and as body {"error": "one sentence for the user"}.
"""
