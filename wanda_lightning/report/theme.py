"""The colors of pages and figures, in light and in dark."""

COLORS = {
    "ink": ("#1f2530", "#e4e8ee"),
    "muted": ("#66707d", "#97a2b0"),
    "line": ("#dde2e8", "#2c343f"),
    "surface": ("#fefefd", "#12161c"),
    "raised": ("#f5f6f8", "#1a2028"),
    "accent": ("#2c68ad", "#6aa9ec"),
    "series-1": ("#2d6ab0", "#6eaaee"),
    "series-2": ("#c8692f", "#ee9a66"),
    "series-3": ("#3a8a5a", "#6cc08c"),
    "series-4": ("#93509b", "#cb8fd2"),
    "series-5": ("#857021", "#cbb45c"),
    "series-6": ("#2f8f9d", "#66c3d0"),
    "series-7": ("#bb4a63", "#ec8ba0"),
    "series-8": ("#6c7480", "#a4adb9"),
}
"""By name: the color in the light and in the dark theme. Figures are drawn with the light ones, which all differ."""

ACCENT, INK, LINE, MUTED, SURFACE = (COLORS[name][0] for name in ("accent", "ink", "line", "muted", "surface"))
SERIES = [light for name, (light, _) in COLORS.items() if name.startswith("series")]
