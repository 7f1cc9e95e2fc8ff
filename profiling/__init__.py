"""The measuring room: compares methods on the engine, and draws and records what it measured. Only
`profiling.dashboard` knows gradio.
"""
