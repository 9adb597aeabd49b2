//! A story as one self-contained page: no script, no link, both colour schemes.

use super::{Mark, Story};

const STYLE: &str = "\
.tdpmmu-story{font:13px/1.45 ui-monospace,Menlo,Consolas,monospace;color:#1b1f24;background:#fff;max-width:100%;overflow-x:auto;padding:12px}\
.tdpmmu-story h2{font-size:15px;margin:0 0 8px}\
.tdpmmu-story pre{white-space:pre-wrap;margin:0 0 12px}\
.tdpmmu-story table{border-collapse:collapse;width:100%}\
.tdpmmu-story th,.tdpmmu-story td{text-align:left;vertical-align:top;padding:1px 8px;border-left:1px solid #d0d7de;background:none}\
.tdpmmu-story td:first-child,.tdpmmu-story th:first-child{color:#6e7781;text-align:right;border-left:none}\
.tdpmmu-story th{border-bottom:1px solid #d0d7de}\
.tdpmmu-story .act{font-weight:600}\
.tdpmmu-story .preempted{color:#8250df}\
.tdpmmu-story .violation{background:#ffebe9;color:#a40e26;font-weight:600}\
.tdpmmu-story .folded{color:#8c959f;font-style:italic}\
@media(prefers-color-scheme:dark){.tdpmmu-story{color:#e6edf3;background:#0d1117}\
.tdpmmu-story th,.tdpmmu-story td{border-color:#30363d}\
.tdpmmu-story .preempted{color:#bc8cff}\
.tdpmmu-story .violation{background:#3d1214;color:#ff9492}}";

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn class(mark: Mark) -> &'static str {
    match mark {
        Mark::Plain => "plain",
        Mark::Act => "act",
        Mark::Preempted => "preempted",
        Mark::Violation => "violation",
        Mark::Folded => "folded",
    }
}

pub(super) fn html(story: &Story) -> String {
    let mut page = String::from("<!doctype html><meta charset=\"utf-8\">");
    page += &format!("<title>{}</title><style>{STYLE}</style>", escaped(&story.title));
    page += &format!("<div class=\"tdpmmu-story\"><h2>{}</h2>", escaped(&story.title));
    page += &format!("<pre>{}</pre><table><tr><th>step</th>", escaped(&story.header.join("\n")));
    for name in &story.columns {
        page += &format!("<th>{}</th>", escaped(name));
    }
    page += "</tr>\n";
    let columns = story.columns.len();
    for row in &story.rows {
        let (class, text) = (class(row.mark), escaped(&row.text));
        page += &format!("<tr><td>{}</td>", row.at);
        match row.column {
            None => page += &format!("<td colspan=\"{}\" class=\"{class}\">{text}</td>", columns.max(1)),
            Some(column) => {
                page += &"<td></td>".repeat(column);
                page += &format!("<td class=\"{class}\">{text}</td>");
                page += &"<td></td>".repeat(columns.saturating_sub(column + 1));
            }
        }
        page += "</tr>\n";
    }
    page + "</table></div>\n"
}
