"""The look of the page: quiet surfaces, dense type, tabular figures, one accent per method. Nothing is fetched from elsewhere."""

from __future__ import annotations

from pathlib import Path

from gradio.themes import Base, Color
from gradio.themes.utils import fonts, sizes

CSS_FILE = Path(__file__).parent / "page.css"

_SLATE = Color(
    "#f7f8fa", "#eff1f4", "#e2e6ea", "#ccd3da", "#96a1ad", "#65717d", "#4a545e", "#313a42", "#1d242b", "#151a1f", "#0e1216", "slate"
)
_STEEL = Color(
    "#f1f5f9", "#dfe7ee", "#c3d0dc", "#9db1c4", "#6d879f", "#4c6780", "#3a5168", "#2d4053", "#22313f", "#18232d", "#0f171e", "steel"
)


def theme() -> Base:
    """Gradio's base theme, recoloured and tightened; only fonts that the visitor's system has."""
    base = Base(
        primary_hue=_STEEL,
        secondary_hue=_STEEL,
        neutral_hue=_SLATE,
        text_size=sizes.text_sm,
        spacing_size=sizes.spacing_sm,
        radius_size=sizes.radius_sm,
        font=[fonts.Font(name) for name in ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Noto Sans", "sans-serif")],
        font_mono=[fonts.Font(name) for name in ("ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")],
    )
    return base.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_800",
        body_text_color_dark="#e3e8ed",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        background_fill_primary="white",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="*neutral_50",
        background_fill_secondary_dark="*neutral_950",
        border_color_primary="*neutral_200",
        border_color_primary_dark="*neutral_700",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="0px",
        block_label_text_color="*neutral_500",
        block_label_text_color_dark="*neutral_400",
        block_title_text_color="*neutral_500",
        block_title_text_color_dark="*neutral_400",
        block_title_text_size="*text_xs",
        block_title_text_weight="400",
        block_shadow="none",
        input_background_fill="white",
        input_background_fill_dark="*neutral_950",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        input_border_width="1px",
        input_shadow="none",
        input_shadow_focus="none",
        input_border_color_focus="*primary_500",
        input_border_color_focus_dark="*primary_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_600",
        button_primary_background_fill_dark="*primary_300",
        button_primary_background_fill_hover_dark="*primary_200",
        button_primary_text_color="white",
        button_primary_text_color_dark="*neutral_950",
        button_secondary_background_fill="white",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600",
        button_border_width="1px",
        button_transition="none",
    )
