//! Calls that are to fail.

/// How a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    /// It has no effect.
    Before,
    /// It has its effect, and says that it failed.
    After,
    /// The caller's context is lost, as if earlier work had failed.
    Lose,
}

/// One call that is to fail.
#[derive(Debug, Clone)]
pub(crate) struct Rule {
    /// `None` for calls of any symbol.
    symbol: Option<String>,
    /// Calls till then, this one included.
    left: u64,
    code: u32,
    manner: Manner,
}

impl Rule {
    pub(crate) fn new(symbol: &str, nth: u64, code: u32, manner: Manner) -> Self {
        Self { symbol: (symbol != "*").then(|| symbol.to_owned()), left: nth, code, manner }
    }

    /// `SYMBOL:NTH:CODE` or `SYMBOL:NTH:CODE:MANNER`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let (symbol, nth, code) = (parts.next()?, parts.next()?, parts.next()?);
        let manner = match parts.next() {
            None | Some("before") => Manner::Before,
            Some("after") => Manner::After,
            Some("lose") => Manner::Lose,
            Some(_) => return None,
        };
        if parts.next().is_some() {
            return None;
        }
        Some(Self::new(symbol, nth.parse().ok()?, code.parse().ok()?, manner))
    }

    /// Counts a call.
    fn strikes(&mut self, symbol: &str) -> bool {
        if self.symbol.as_ref().is_some_and(|own| own != symbol) {
            return false;
        }
        self.left = self.left.saturating_sub(1);
        self.left == 0
    }
}

/// Counts a call, and says how it is to fail if it is. A rule strikes once.
pub(crate) fn strike(rules: &mut Vec<Rule>, symbol: &str) -> Option<(Manner, u32)> {
    let mut struck = None;
    rules.retain_mut(|rule| {
        let strikes = rule.strikes(symbol);
        if strikes {
            struck.get_or_insert((rule.manner, rule.code));
        }
        !strikes
    });
    struck
}
