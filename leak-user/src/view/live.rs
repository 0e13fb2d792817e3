//! The text view on a terminal, refreshed in place on the alternate screen. The terminal is restored when the view is
//! dropped, and by a panic hook. Log messages are held back meanwhile ([`LogSink`]).

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Text};
use ratatui::{DefaultTerminal, Frame};

use super::compose::{Look, lines};
use crate::report::Report;

/// What the user wants that the view cannot do itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// End tracing.
    Quit,
}

/// The shortest wait for keys: with none, crossterm does not look at the terminal at all.
const AT_ONCE: Duration = Duration::from_millis(1);

/// The terminal while reports are shown on it.
pub struct LiveView {
    terminal: DefaultTerminal,
    screen: Screen,
}

impl LiveView {
    /// Takes the terminal over; at most `top` growing stacks are listed for a process.
    pub fn new(top: usize) -> io::Result<Self> {
        // Part of it may have been done.
        let terminal = ratatui::try_init().inspect_err(|_| drop(ratatui::try_restore()))?;
        LogSink::hold();
        let mut view = Self { terminal, screen: Screen::new(top) };
        view.redraw()?;
        Ok(view)
    }

    /// Shows a report. Where the user has scrolled to stays.
    pub fn draw(&mut self, report: &Report) -> io::Result<()> {
        self.screen.report = Some(report.clone());
        self.redraw()
    }

    /// Waits for keys up to `timeout`, scrolls and adapts to a new size; tells what else the user wants.
    pub fn poll_input(&mut self, timeout: Duration) -> io::Result<Option<Input>> {
        let mut timeout = timeout.max(AT_ONCE);
        while event::poll(timeout)? {
            timeout = AT_ONCE;
            match event::read()? {
                Event::Key(key) if key.kind != KeyEventKind::Release => {
                    if let Some(input) = self.screen.key(key) {
                        return Ok(Some(input));
                    }
                }
                Event::Resize(..) => {}
                _ => continue,
            }
            self.redraw()?;
        }
        Ok(None)
    }

    fn redraw(&mut self) -> io::Result<()> {
        self.terminal.draw(|frame| self.screen.render(frame)).map(|_| ())
    }
}

impl Drop for LiveView {
    fn drop(&mut self) {
        ratatui::restore();
        LogSink::release();
    }
}

/// What stands on the screen; knows no terminal.
struct Screen {
    report: Option<Report>,
    top: usize,
    /// Lines above the first visible one.
    scroll: usize,
    /// Visible lines, as of the last rendering.
    page: usize,
}

impl Screen {
    fn new(top: usize) -> Self {
        Self { report: None, top, scroll: 0, page: 1 }
    }

    fn key(&mut self, key: KeyEvent) -> Option<Input> {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        // The far end is found when rendering, which knows how many lines there are.
        self.scroll = match key.code {
            KeyCode::Char('c' | 'd') if control => return Some(Input::Quit),
            KeyCode::Char('q' | 'Q') | KeyCode::Esc => return Some(Input::Quit),
            KeyCode::Up | KeyCode::Char('k') => self.scroll.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => self.scroll.saturating_add(1),
            KeyCode::PageUp | KeyCode::Char('b') => self.scroll.saturating_sub(self.page),
            KeyCode::PageDown | KeyCode::Char(' ') => self.scroll.saturating_add(self.page),
            KeyCode::Home | KeyCode::Char('g') => 0,
            KeyCode::End | KeyCode::Char('G') => usize::MAX,
            _ => self.scroll,
        };
        None
    }

    fn render(&mut self, frame: &mut Frame) {
        let [body, footer] = Layout::vertical([Constraint::Min(0), Constraint::Length(1)]).areas(frame.area());
        let look = Look { width: body.width.into(), cut: true, top: self.top };
        let lines = match &self.report {
            Some(report) => lines(report, look),
            None => vec![Line::from("Waiting for the first report …")],
        };
        self.page = usize::from(body.height).max(1);
        let count = lines.len();
        self.scroll = self.scroll.min(count.saturating_sub(self.page));
        let visible: Vec<Line> = lines.into_iter().skip(self.scroll).take(self.page).collect();
        frame.render_widget(Text::from(visible), body);

        let keys = if count > self.page {
            let last = (self.scroll + self.page).min(count);
            format!(" q quit   ↑ ↓ PgUp PgDn scroll   lines {}-{last} of {count}", self.scroll + 1)
        } else {
            " q quit".to_owned()
        };
        // Padded, so that the whole line is reversed.
        let columns = usize::from(footer.width);
        frame.render_widget(Line::styled(format!("{keys:columns$}"), REVERSED), footer);
    }
}

const REVERSED: Style = Style::new().add_modifier(Modifier::REVERSED);

/// Held-back log text, while a live view has the terminal.
static HELD: Mutex<Option<Vec<u8>>> = Mutex::new(None);

/// The most bytes of log text that are held back.
const HELD_MAX: usize = 256 * 1024;

/// Where the logger should write: the standard error, but while a live view has the terminal into memory, to be shown
/// when it gives it back.
#[derive(Clone, Copy, Debug, Default)]
pub struct LogSink;

impl LogSink {
    fn hold() {
        HELD.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default();
    }

    fn release() {
        if let Some(text) = HELD.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // There is nobody left to tell if that fails.
            let _ = io::stderr().write_all(&text);
        }
    }
}

impl Write for LogSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match HELD.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(held) => {
                // The first messages tell more than the last of a flood.
                held.extend_from_slice(&bytes[..bytes.len().min(HELD_MAX - held.len())]);
                Ok(bytes.len())
            }
            None => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn show(screen: &mut Screen, columns: u16, rows: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(columns, rows)).unwrap();
        terminal.draw(|frame| screen.render(frame)).unwrap();
        let buffer = terminal.backend().buffer();
        (0..rows)
            .map(|y| (0..columns).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned())
            .collect()
    }

    fn press(screen: &mut Screen, code: KeyCode) -> Option<Input> {
        screen.key(KeyEvent::new(code, KeyModifiers::NONE))
    }

    /// The screen shows the text report from its top, with the keys in the last line.
    #[test]
    fn shows_the_report() {
        let mut screen = Screen::new(10);
        assert!(show(&mut screen, 80, 10)[0].contains("Waiting"));
        screen.report = Some(sample::leaking());
        let rows = show(&mut screen, 80, 60);
        let golden: Vec<&str> = include_str!("golden/leaking80.txt").lines().collect();
        assert_eq!(rows[..golden.len()], golden);
        assert_eq!(rows[59], " q quit");
    }

    /// Scrolling stops at both ends, follows the keys, and survives a resize to almost nothing.
    #[test]
    fn scrolls() {
        let mut screen = Screen::new(10);
        screen.report = Some(sample::leaking());
        let top = show(&mut screen, 80, 11);
        assert!(top[10].contains("lines 1-10 of"));
        press(&mut screen, KeyCode::Up);
        assert_eq!(show(&mut screen, 80, 11), top);
        press(&mut screen, KeyCode::Down);
        assert_eq!(show(&mut screen, 80, 11)[0], top[1]);
        press(&mut screen, KeyCode::PageDown);
        assert!(show(&mut screen, 80, 11)[10].contains("lines 12-21 of"));
        press(&mut screen, KeyCode::End);
        let end = show(&mut screen, 80, 11);
        press(&mut screen, KeyCode::PageDown);
        assert_eq!(show(&mut screen, 80, 11), end);
        assert_eq!(end[9], include_str!("golden/leaking80.txt").lines().last().unwrap());
        for (columns, rows) in [(1, 1), (3, 2), (200, 1), (20, 100)] {
            show(&mut screen, columns, rows);
        }
        press(&mut screen, KeyCode::Home);
        assert_eq!(show(&mut screen, 80, 11), top);
    }

    /// q, Esc and Ctrl-C (which raw mode hands over as a key) end tracing; other keys do not.
    #[test]
    fn quits() {
        let mut screen = Screen::new(10);
        assert_eq!(press(&mut screen, KeyCode::Char('q')), Some(Input::Quit));
        assert_eq!(press(&mut screen, KeyCode::Esc), Some(Input::Quit));
        assert_eq!(screen.key(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)), Some(Input::Quit));
        assert_eq!(press(&mut screen, KeyCode::Char('c')), None);
    }

    /// A flood of log messages is held in bounded memory and does not fail the logger.
    #[test]
    fn held_log_is_bounded() {
        LogSink::hold();
        for _ in 0..600 {
            LogSink.write_all(&[b'x'; 1000]).unwrap();
        }
        let held = HELD.lock().unwrap().take().unwrap();
        assert_eq!(held.len(), HELD_MAX);
    }
}
