# SPDX-License-Identifier: Apache-2.0
"""What a picture says, read from the figure instead of the PNG."""

from matplotlib.figure import Figure


def figures(monkeypatch):
  """Collects the figures that are written from now on."""
  written, save = [], Figure.savefig

  def savefig(figure, *args, **kwargs):
    written.append(figure)
    save(figure, *args, **kwargs)

  monkeypatch.setattr(Figure, 'savefig', savefig)
  return written


def texts(figure):
  """All that is written in a figure."""
  written = figure.findobj(lambda artist: hasattr(artist, 'get_text'))
  return [text for artist in written if (text := artist.get_text())]
