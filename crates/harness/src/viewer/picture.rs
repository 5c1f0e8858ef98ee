//! What was on a screen.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use anyhow::{Context, Result};

/// A rectangle of a screen, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// The left edge.
    pub x: u16,
    /// The upper edge.
    pub y: u16,
    /// The width.
    pub width: u16,
    /// The height.
    pub height: u16,
}

impl Region {
    /// A region.
    pub const fn new(x: u16, y: u16, width: u16, height: u16) -> Self {
        Self { x, y, width, height }
    }

    /// Whether a pixel is in it.
    pub fn contains(&self, x: u16, y: u16) -> bool {
        (self.x..self.x.saturating_add(self.width)).contains(&x)
            && (self.y..self.y.saturating_add(self.height)).contains(&y)
    }

    /// The pixel in the middle.
    pub fn middle(&self) -> (u16, u16) {
        (self.x + self.width / 2, self.y + self.height / 2)
    }
}

/// Pixels, row by row, `0x00RRGGBB`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Picture {
    /// Pixels a row.
    pub width: u16,
    /// Rows.
    pub height: u16,
    /// The pixels.
    pub pixels: Vec<u32>,
}

impl Picture {
    /// A black one.
    pub fn new((width, height): (u16, u16)) -> Self {
        Self { width, height, pixels: vec![0; usize::from(width) * usize::from(height)] }
    }

    /// The pixels of a row, from `x` on, `width` of them; `None` if the picture has no such pixels.
    pub fn row_mut(&mut self, x: u16, y: u16, width: u16) -> Option<&mut [u32]> {
        if y >= self.height || x.checked_add(width)? > self.width {
            return None;
        }
        let start = usize::from(y) * usize::from(self.width) + usize::from(x);
        self.pixels.get_mut(start..start + usize::from(width))
    }

    /// The part of it in `region`, which is cut off at the edges.
    pub fn part(&self, region: Region) -> Self {
        let (left, right) = (region.x.min(self.width), region.x.saturating_add(region.width).min(self.width));
        let (top, bottom) = (region.y.min(self.height), region.y.saturating_add(region.height).min(self.height));
        let (width, height) = (right - left, bottom - top);
        let rows = self.pixels.chunks_exact(usize::from(self.width).max(1));
        let rows = rows.skip(usize::from(top)).take(usize::from(height));
        let pixels = rows.flat_map(|row| &row[usize::from(left)..usize::from(right)]).copied().collect();
        Self { width, height, pixels }
    }

    fn coordinates(&self) -> impl Iterator<Item = (u16, u16)> {
        let width = self.width;
        (0..self.height).flat_map(move |y| (0..width).map(move |x| (x, y)))
    }

    /// How it differs from `other` outside `moving`: `None` where it does not, or the smallest region around all that
    /// does.
    pub fn difference(&self, other: &Self, moving: &[Region]) -> Option<Region> {
        if (self.width, self.height) != (other.width, other.height) {
            return Some(Region::new(0, 0, self.width.max(other.width), self.height.max(other.height)));
        }
        let pixels = self.coordinates().zip(self.pixels.iter().zip(&other.pixels));
        let differing = pixels.filter(|(_, (a, b))| a != b).map(|(at, _)| at);
        let mut bounds: Option<(u16, u16, u16, u16)> = None;
        for (x, y) in differing.filter(|(x, y)| !moving.iter().any(|region| region.contains(*x, *y))) {
            let (left, top, right, bottom) = bounds.unwrap_or((x, y, x, y));
            bounds = Some((left.min(x), top.min(y), right.max(x), bottom.max(y)));
        }
        bounds.map(|(left, top, right, bottom)| Region::new(left, top, right - left + 1, bottom - top + 1))
    }

    /// The share of the picture that [`difference`](Self::difference) looks at.
    pub fn compared(&self, moving: &[Region]) -> f64 {
        let still = self.coordinates().filter(|(x, y)| !moving.iter().any(|region| region.contains(*x, *y))).count();
        still as f64 / self.pixels.len().max(1) as f64
    }

    /// This one and `other`, which is as high, side by side.
    pub fn beside(&self, other: &Self) -> Self {
        let left = self.pixels.chunks_exact(usize::from(self.width).max(1));
        let right = other.pixels.chunks_exact(usize::from(other.width).max(1));
        let pixels = left.zip(right).flat_map(|(left, right)| [left, right].concat()).collect();
        Self { width: self.width + other.width, height: self.height.min(other.height), pixels }
    }

    /// Whether there is more than one colour in it.
    pub fn shows_something(&self) -> bool {
        self.pixels.windows(2).any(|pair| pair[0] != pair[1])
    }

    /// Writes it as a PNG file.
    pub fn write_png(&self, path: &Path) -> Result<()> {
        let file = File::create(path).with_context(|| format!("making {}", path.display()))?;
        let mut encoder = png::Encoder::new(BufWriter::new(file), u32::from(self.width), u32::from(self.height));
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_compression(png::Compression::High);
        let bytes: Vec<u8> = self.pixels.iter().flat_map(|p| [(p >> 16) as u8, (p >> 8) as u8, *p as u8]).collect();
        let mut writer = encoder.write_header().with_context(|| format!("writing {}", path.display()))?;
        writer.write_image_data(&bytes).with_context(|| format!("writing {}", path.display()))?;
        writer.finish().with_context(|| format!("writing {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_outside_what_moves() {
        let before = Picture::new((10, 8));
        let mut after = before.clone();
        assert_eq!(before.difference(&after, &[]), None);
        after.row_mut(2, 3, 4).unwrap().fill(0xff_ffff);
        after.row_mut(1, 5, 1).unwrap().fill(1);
        assert_eq!(before.difference(&after, &[]), Some(Region::new(1, 3, 5, 3)));
        let moving = [Region::new(2, 3, 4, 1), Region::new(0, 5, 2, 1)];
        assert_eq!(before.difference(&after, &moving[..1]), Some(Region::new(1, 5, 1, 1)));
        assert_eq!(before.difference(&after, &moving), None);
        assert!((before.compared(&moving) - (80.0 - 6.0) / 80.0).abs() < 1e-9);
        assert!(after.row_mut(8, 0, 3).is_none());
        assert_eq!(after.part(Region::new(1, 3, 3, 2)).pixels, [0, 0xff_ffff, 0xff_ffff, 0, 0, 0]);
    }
}
