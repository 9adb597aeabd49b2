//! A story in columns of text, 120 characters wide for three threads.

use super::{Mark, Story};

/// Width of the page.
const WIDTH: usize = 120;
/// The step number and the bar after it.
const STEP: usize = 7;
/// No column is narrower; more threads than fit make the page wider.
const NARROWEST: usize = 19;

/// Wraps `text` at words into lines of at most `width` characters; a word that is longer is cut.
pub(super) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let mut word: Vec<char> = word.chars().collect();
        loop {
            let last = lines.last_mut().unwrap_or_else(|| unreachable!("never empty"));
            let used = last.chars().count();
            let room = if used == 0 { width } else { width.saturating_sub(used + 1) };
            if word.len() <= room {
                if used != 0 {
                    last.push(' ');
                }
                last.extend(word);
                break;
            }
            if used == 0 {
                last.extend(word.drain(..width));
            }
            // Continued lines are set in, so that a new row shows.
            lines.push("  ".to_owned());
            if word.len() + 2 > width {
                let last = lines.last_mut().unwrap_or_else(|| unreachable!("never empty"));
                let cut = width.saturating_sub(2).max(1).min(word.len());
                last.extend(word.drain(..cut));
                lines.push(String::new());
            } else {
                let last = lines.last_mut().unwrap_or_else(|| unreachable!("never empty"));
                last.extend(word);
                break;
            }
        }
    }
    lines
}

fn push_header(text: &mut String, line: &str) {
    let (label, rest) = line.split_at_checked(12).unwrap_or(("", line));
    for (n, part) in wrap(rest, WIDTH - 12).into_iter().enumerate() {
        *text += &format!("{:12}{}\n", if n == 0 { label } else { "" }, part.trim_start());
    }
}

pub(super) fn text(story: &Story) -> String {
    let columns = story.columns.len().max(1);
    let width = (WIDTH.saturating_sub(STEP + 3 * (columns - 1)) / columns).max(NARROWEST);
    let mut text = format!("{}\n\n", story.title);
    for line in &story.header {
        push_header(&mut text, line);
    }
    text.push('\n');
    let row = |cells: &[&str], step: &str| {
        let cells: Vec<_> = cells.iter().map(|cell| format!("{cell:width$}")).collect();
        format!("{step:>5}  {}", cells.join(" | ")).trim_end().to_owned() + "\n"
    };
    let names: Vec<&str> = story.columns.iter().map(String::as_str).collect();
    text += &row(&names, "step");
    let rules: Vec<String> = names.iter().map(|_| "-".repeat(width)).collect();
    text += &row(&rules.iter().map(String::as_str).collect::<Vec<_>>(), "----");
    let whole = width * columns + 3 * (columns - 1);
    for told in &story.rows {
        let Some(column) = told.column else {
            for (n, line) in wrap(&told.text, whole.saturating_sub(2)).into_iter().enumerate() {
                let step = if n == 0 { told.at.to_string() } else { String::new() };
                text += &format!("{step:>5}  {line}\n");
            }
            continue;
        };
        for (n, line) in wrap(&told.text, width).into_iter().enumerate() {
            let step = if n == 0 && told.mark != Mark::Folded { told.at.to_string() } else { String::new() };
            let mut cells = vec![""; columns];
            cells[column] = &line;
            text += &row(&cells, &step);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_wrapped_at_words_and_lose_nothing() {
        let text =
            "root 3: vcpu -1, 2 refs (mmu 1, vcpu 1) and a_word_that_is_much_longer_than_the_column_is";
        for width in [8, 10, 17, 24, 120] {
            let lines = wrap(text, width);
            assert!(lines.iter().all(|line| line.chars().count() <= width), "{width}: {lines:?}");
            let joined: String = lines.concat().chars().filter(|c| *c != ' ').collect();
            assert_eq!(joined, text.replace(' ', ""), "{width}");
        }
    }
}
