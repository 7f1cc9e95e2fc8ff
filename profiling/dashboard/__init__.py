"""The page. This is the only package that knows gradio: one file per tab, the live components, the theme."""
